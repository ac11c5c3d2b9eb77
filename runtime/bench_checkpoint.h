#pragma once
#include <string>
#include <vector>

#include "core/file.h"
#include "model/config.h"
#include "parallel/groups.h"

namespace moemamba {

struct CheckpointBenchOptions {
  std::string folder;  // anew for this, and removed with all that is in it
  int64_t repeat = 20;
};

// Seconds, of rank 0 between two barriers. The ceiling of a save is the slower of hashing the same
// bytes on all cores and writing them to the same disk one after the other past the page cache, of
// loading the slower of hashing and reading; all measured in turn in every round.
struct CheckpointBench {
  struct Round {
    double save = 0, load = 0;   // while training waits
    double save_processors = 0;  // their time that the save took of this process, all threads
    double hash = 0, write = 0, read = 0;
    double held_up = 0;  // training, by an asynchronous save: until the call returns
    double staged = 0;   // until its copy of the state is there, and the optimizer may go on
    double behind = 0;   // until it is written and read again
    double save_ceiling() const { return hash > write ? hash : write; }
    double load_ceiling() const { return hash > read ? hash : read; }
  };
  int64_t bytes = 0;  // of a checkpoint's files
  int ranks = 1;
  std::vector<Round> rounds;
  double median(double Round::*figure) const;
  double save_ratio() const;  // medians, each to the ceiling of its own round
  double load_ratio() const;
};

// Saves and loads a model's whole state, values and moments. Every rank calls it; rank 0 has the
// figures.
CheckpointBench bench_checkpoint(FileSystem& files, ProcessGroups& groups, const ModelSizes& sizes,
                                 const CheckpointBenchOptions& options);

// A table for people.
std::string checkpoint_bench_text(const CheckpointBench& bench);

}  // namespace moemamba
