#pragma once
#include <functional>
#include <string>
#include <vector>

#include "model/language_model.h"
#include "runtime/checkpoint_reader.h"
#include "runtime/checkpoints.h"

namespace moemamba {

// A small model that is there to have a state: every value and moment is a function of a seed, the
// tensor's name and the index, so the layout does not matter. Convention of these tests: the state
// after step S is that of seed S.
//
// tiny: all of its files are written through the page cache. large: 80 KB of embedding, so that
// values begin on a border of blocks and go past it where the file system can do that.
enum class StateSize { tiny, large };
struct StateHolder {
  ParameterStore store;
  LanguageModel model;

  explicit StateHolder(ProcessGroups& groups, StateSize size = StateSize::tiny);
  void fill(uint64_t seed);
};
constexpr int kStateExperts = 3;
// state_hash of a holder filled with it
uint64_t hash_of_seed(uint64_t seed, StateSize size = StateSize::tiny);

CheckpointFacts facts_of(int64_t step);

using Disks = std::function<FileSystem&(int rank)>;
FileSystem& plain_disk();  // no faults

// One save of the state after `step`, on rank threads.
struct SaveCase {
  std::string run;
  int64_t step = 1;
  Disks disks;  // empty: plain
  int ranks = 2, expert = 2;
  int64_t generation = 1;
  std::function<bool()> may_write;
  std::chrono::milliseconds deadline = std::chrono::seconds(60);
  size_t block_bytes = kDirectBlock;  // small, as the state is: several writes a file
  std::vector<double>* seconds = nullptr;  // until each rank had its verdict
  StateSize size = StateSize::tiny;
};
// What write() said on every rank; "lost: ..." where it threw PeerLost.
std::vector<std::string> save(const SaveCase& c);

// The step of the newest checkpoint that holds, whose state must have that step's hash (else a test
// failure); 0: there is none; -1: some are there and none can be used. Damaged ones are set aside.
int64_t loaded_step(const std::string& run, int64_t generation = 99, std::string* why = nullptr,
                    StateSize size = StateSize::tiny);
// The shards of the run's newest checkpoint whose values begin on a border of blocks, and have one
// of their own at least.
int64_t shards_on_borders(const std::string& run);

// What a launch of the program does with its folder, in the same order: lease, claim or load, save
// the step after, clean up.
struct LaunchCase {
  std::string run;
  Disks disks;  // empty: plain
  bool overwrite = false;
  int ranks = 2, expert = 2;
  Retention retention;
};
struct LaunchResult {
  int64_t loaded = 0;   // 0: it was a new run
  std::string problem;  // of its save
};
LaunchResult launch(const LaunchCase& c);

// A folder in memory where there is one (/dev/shm), gone at the end.
class MemoryFolder {
 public:
  explicit MemoryFolder(const std::string& name);
  MemoryFolder(const MemoryFolder&) = delete;
  MemoryFolder& operator=(const MemoryFolder&) = delete;
  ~MemoryFolder();
  std::string path() const { return path_; }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

// Flips one bit of a file, in place.
void flip_bit(const std::string& path, int64_t bit);

}  // namespace moemamba
