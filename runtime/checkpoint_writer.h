#pragma once
#include <optional>

#include "core/arena.h"
#include "runtime/checkpoint_folder.h"
#include "runtime/checkpoint_shard.h"

namespace moemamba {

// What a checkpoint says beyond its tensors.
struct CheckpointFacts {
  int64_t step = 0;  // steps done
  int64_t next_sample = 0;
  double loss = 0;
  std::string chain;
  std::string run_id, config, tokenizer, build;
  SafetensorsMetadata metadata;  // of the files with weights
  // Small files that go along, by name: the tokenizer.
  std::vector<std::pair<std::string, std::string>> extra_files;
};

// Writes checkpoints (docs/checkpoint_format.md). Until commit the previous checkpoint is the
// newest, afterwards this one; a crash at any instant leaves exactly one of the two. Every rank
// calls the same methods; rank 0 makes folders, writes the manifest, commits.
//   stage()  copies what this rank writes, so that training may go on, and as files will have it
//   write()  from the copy: shards, votes of all ranks, manifest, one rename
class CheckpointWriter {
 public:
  struct Options {
    std::string run;
    int64_t generation = 0;           // of the lease
    std::function<bool()> may_write;  // rank 0: the lease is still ours; empty: always
    size_t block_bytes = ShardWriting().block_bytes;  // most of one write
  };
  CheckpointWriter(FileSystem& files, ProcessGroups& groups, const ParameterStore& store,
                   Options options);

  // Memory of the copies. The constructor takes it, for the first save would hold up training with
  // that.
  int64_t staged_bytes() const { return staging_.bytes(); }
  // Behind the work of `compute` so far; nothing may change the state before the event that is
  // returned is past. A GPU copies on a stream of its own; on the CPU (where `compute` may be left
  // out) it is past at once.
  Event stage(Stream* compute = nullptr);
  // "" when the checkpoint is there for good; else why this attempt was given up, the same on every
  // rank, with nothing left of it but perhaps a folder that says what it is (or, where only the
  // last sync failed, the whole checkpoint). Throws PeerLost alone.
  std::string write(const CheckpointFacts& facts);

 private:
  std::string begin(const CheckpointFacts& facts, std::string& attempt);
  ShardReport write_state(const CheckpointFacts& facts, const std::string& attempt);
  CheckpointManifest merge(const CheckpointFacts& facts, const std::vector<std::string>& reports);
  void write_manifest(const CheckpointFacts& facts, const std::string& attempt,
                      CheckpointManifest manifest);
  void publish(const CheckpointFacts& facts, const std::string& attempt);
  void publish_by_links(const std::string& attempt, const std::string& place);
  std::string conclude(const CheckpointFacts& facts, const std::string& attempt,
                       const std::vector<std::string>& reports);

  FileSystem& files_;
  ProcessGroups& groups_;
  Options options_;
  Stream stream_;
  std::optional<Stream> copies_;  // of a GPU
  Event copied_;
  std::vector<StatePiece> sources_, staged_;
  int64_t state_bytes_ = 0;
  Buffer staging_;
};

}  // namespace moemamba
