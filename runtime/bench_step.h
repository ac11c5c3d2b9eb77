#pragma once
#include <map>
#include <string>
#include <vector>

#include "runtime/bench_kernels.h"
#include "runtime/trainer.h"

namespace moemamba {

struct StepBenchOptions {
  int64_t warmup = 10, steps = 30;  // measured: `steps` after `warmup`
  bool profile = false;             // also the time of each operator, over further steps
};

struct StepBench {
  std::vector<double> seconds;  // of each measured step, sorted
  double tokens = 0;            // of one step, over all ranks
  double flops = 0;             // of its products, over all ranks
  ProductCeiling ceiling;       // of one rank, while all of them measure it
  int ranks = 1;
  int64_t gpu_bytes = 0;        // what the process has taken of its GPU; 0 on the CPU
  double first_loss = 0, last_loss = 0;
  struct Work {
    double seconds = 0;  // in one step
    int64_t calls = 0;   // likewise
  };
  std::map<std::string, Work> work;  // of a profile, of this rank's compute stream
  double profiled = 0;               // seconds of a profiled step
  double median() const { return seconds[seconds.size() / 2]; }
  double share() const { return flops / median() / (ceiling.rate * ranks); }
};

// Trains: every rank calls it. Step times are from one step's end to the next one's.
StepBench bench_step(ProcessGroups& groups, const TrainerOptions& options,
                     const StepBenchOptions& bench);

// A table for people.
std::string step_bench_text(const StepBench& bench);

// Writes a token file of text-like frequencies (Zipf's law) for trainings whose text does not
// matter; the same for the same vocabulary.
void write_zipf_tokens(FileSystem& files, const std::string& path, int64_t vocabulary,
                       int64_t tokens);

}  // namespace moemamba
