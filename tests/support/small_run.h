#pragma once
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "runtime/checkpoint_reader.h"
#include "runtime/commands.h"

namespace moemamba {

// A run of the whole training loop, checkpoints and all, that takes milliseconds.
struct SmallRun {
  std::string folder;  // of the run
  int ranks = 1, expert = 1;
  int64_t experts = 3, steps = 8, batch = 4, micro_batch = 0, save_interval = 0;
  int64_t vocabulary = 0;  // 0: of the bytes tokenizer
  bool asynchronous = true;
  int64_t keep_last = 2;
  const char* model = "";  // further fields of ModelConfig, as text; they win
  const char* data = "";   // of DataConfig; its token files are synthetic ones unless given here
  int64_t tokens = 0;      // of a text that is shorter than the synthetic one; 0: that
  uint64_t seed = 42;
  // This launch ends, as asked by rank `stop_rank`, after so many steps of its own; 0: at its end.
  int64_t launch_steps = 0;
  int stop_rank = 0;
  std::function<bool()> stop_when;  // or when this says so on that rank, asked before each step
  // This launch fails before its step number `crash_at` (counted from 0), on its last rank.
  int64_t crash_at = -1;
  std::function<void(int rank, int64_t step)> before_step;  // steps of this launch
  FileSystem* files = nullptr;                              // null: real ones that sync nothing
  const char* train = "";  // further fields of TrainConfig, as text; they win
  std::function<bool(int rank, int64_t step)> spoil;  // TrainerOptions::spoil of each rank
  std::function<void(const RunEvent&)> on_event;
  std::function<void(int rank, TrainRequest&)> change;  // on each rank, at last
  std::function<void(ProcessGroups&)> wire;  // on each rank, before its run
};
// One launch. Throws what it throws.
TrainResult launch(const SmallRun& run);
TrainRequest request_of(const SmallRun& run);

// The lines of metrics.jsonl without what clocks say, in order.
std::vector<std::string> steps_of(const std::string& run);
// Of the run's newest checkpoint, without files and tensors.
CheckpointManifest newest_manifest(const std::string& run);
// Of a MANIFEST.pb that holds, all of it.
CheckpointManifest whole_manifest(const std::string& sealed);

// All values and moments of a checkpoint by "kind/name", whole tensors.
std::map<std::string, std::vector<float>> whole_state(const std::string& checkpoint);
// Their hash, computed from the files alone.
uint64_t hash_of_files(const std::string& checkpoint);

// Every name below a folder, with what it is, holds and when it was changed.
std::map<std::string, std::string> tree_of(const std::string& folder);
void copy_tree(const std::string& from, const std::string& to);

// The newest checkpoint that one rank with this run's model finds, as a launch finds it: nothing,
// its manifest, or an Error. `said`: what it says meanwhile.
std::optional<CheckpointManifest> find_newest(const SmallRun& run, std::string* said = nullptr,
                                              int64_t generation = 7);

}  // namespace moemamba
