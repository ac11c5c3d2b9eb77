#pragma once
#include <optional>
#include <string>
#include <vector>

#include "runtime/checkpoint_reader.h"

namespace moemamba {

// Looking at checkpoints without ranks: what `moemamba inspect` shows. Nothing here writes.

// The folder of a checkpoint: `place` itself, or of the run `place` the one of `step` (none: the
// newest).
std::string find_checkpoint(const std::string& place, std::optional<int64_t> step);

// One name in <run>/checkpoints. Sizes and manifest are looked at, digests of shards are not.
struct ListedCheckpoint {
  std::string name;
  NameKind kind = NameKind::checkpoint;
  int64_t step = -1;    // -1: not known
  int64_t bytes = 0;    // of the files in it
  std::string problem;  // of a checkpoint: what is wrong with its manifest or sizes; "": complete
  int ranks = 0, expert_ranks = 0, experts = 0;  // layout that wrote it
  int64_t next_sample = 0;
  double loss = 0;
};
const char* name_of(NameKind kind);
std::vector<ListedCheckpoint> list_run(const std::string& run);  // newest first

// Everything that can be checked about one checkpoint, every byte read: manifest, sizes, digests,
// headers of the shards against the manifest's pieces, index, hash of the state.
struct CheckpointVerdict {
  std::string path;
  int64_t step = -1, bytes = 0;
  int files = 0, tensors = 0;
  std::vector<std::string> problems;
  std::vector<std::string> notes;  // what is odd, but harms nothing
};
CheckpointVerdict verify_checkpoint(const std::string& path);

// How values or moments of one tensor differ between two checkpoints, bit by bit.
struct TensorDifference {
  std::string name;
  StateKind kind = StateKind::value;
  std::string problem;  // not comparable: "only in A", shapes
  int64_t elements = 0, differing = 0;
  double largest = 0;   // |a - b|; NaN where one of the two is
  double relative = 0;  // norm(a - b) / norm(a)
};
struct CheckpointDifference {
  int64_t compared = 0;                   // tensors that both have, values and moments apart
  std::vector<TensorDifference> tensors;  // those that differ, by name
};
CheckpointDifference compare_checkpoints(const Checkpoint& a, const Checkpoint& b);

// Facts of two manifests that are not equal: (name, of a, of b).
struct FactDifference {
  std::string name, a, b;
  bool counts = true;  // makes the checkpoints different
};

// For programs.
std::string list_json(const std::string& run, const std::vector<ListedCheckpoint>& list);
std::string show_json(const Checkpoint& checkpoint, bool tensors);
std::string verify_json(const std::vector<CheckpointVerdict>& verdicts);
std::string diff_json(const Checkpoint& a, const Checkpoint& b,
                      const CheckpointDifference& difference,
                      const std::vector<FactDifference>& facts, bool equal);
struct Resharded {
  std::string output;
  int ranks = 1, expert_ranks = 1;  // of its layout
  bool weights_only = false;
};
std::string reshard_json(const Checkpoint& from, const Resharded& made);
struct Pruned {
  std::string run;
  bool dry_run = false;                        // then nothing is gone yet
  std::vector<CheckpointPlace> deleted, kept;  // newest first
};
std::string prune_json(const Pruned& pruned);

}  // namespace moemamba
