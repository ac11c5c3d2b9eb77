#pragma once
#include <optional>

#include "model/counts.h"
#include "runtime/trainer.h"

namespace moemamba {  // letters: E experts, M ranks of the expert group

// Bytes of one rank. The values are f32: there are no masters beside them.
struct PlannedBytes {
  TrainerBytes trainer;   // activations: all of the arena
  int64_t exchange = 0;   // of the activations: what the exchange reads and writes, at the peak
  int64_t dense = 0;      // of the values: parameters that every rank holds whole
  int64_t staging = 0;    // the copy that a checkpoint is written from, behind the steps
                          // (a GPU's copy is in the host's memory: 0)
  int64_t samples = 0;    // states and logits of texts that are written between the steps
  int64_t workspace = 0;  // of a GPU: what operators take besides, by estimate; 0 on the CPU
  int64_t scratch = 0;    // the same on the CPU, not in total()
  std::vector<Arena::Taken> largest;  // activations at the peak, added up by name, largest first
  int64_t total() const { return trainer.total() + staging + samples + workspace; }
};

// Bytes that one rank sends in a step, to other ranks. Tokens are spread evenly over the experts.
struct PlannedWires {
  struct Gradients {
    int64_t reduce_scatter = 0, all_gather = 0;
    int64_t total() const { return reduce_scatter + all_gather; }
  };
  Gradients data, expert_data;
  struct Exchange {
    int64_t dispatch = 0, combine = 0;  // forward
    int64_t dispatch_backward = 0, combine_backward = 0;
    int64_t counts = 0;  // who sends how many rows to whom
    int64_t total() const {
      return dispatch + combine + dispatch_backward + combine_backward + counts;
    }
  } expert;
  int64_t control = 0;
};

// What makes a plan fit that does not.
struct Remedy {
  int ranks, expert;
  int64_t micro_batch;  // the largest that fits then
};
// Why no number of ranks does.
struct Obstacle {
  int ranks, expert;   // the layout that comes closest, with one routing group a micro-batch
  int64_t total;       // bytes of a rank there
  std::string what;    // the largest part of them
  int64_t bytes;       // of that part
  std::string reduce;  // settings
};

// A training run as it would be, on its fullest and busiest rank. That is rank 0: micro-batches are
// equally large on all ranks, and the first coordinates of the expert axis have one expert more
// where E does not divide by M.
struct Plan {
  TrainerOptions options;
  RankLayout layout;
  ModelCounts counts;
  int64_t memory;  // bytes that one rank may take
  BatchShare share;
  int64_t most_sequences;  // of one rank in a step
  int64_t idle_ranks;      // without a sequence
  PlannedBytes bytes;
  PlannedWires wires;
  int64_t weights_bytes;        // on disk, all ranks: f32
  int64_t checkpoint_bytes;     // with both moments
  int64_t largest_micro_batch;  // whole routing groups that fit; 0: not even one
  std::optional<Remedy> remedy;
  std::optional<Obstacle> obstacle;

  bool fits() const { return bytes.total() <= memory; }
  double product_flops() const { return options.sizes.matmul_flops_per_token(); }  // per token
  double attention_flops() const {
    return options.sizes.attention_flops_per_token(options.data.sequence_length);
  }
  double flops_per_token() const { return product_flops() + attention_flops(); }
  int64_t tokens_per_step() const {
    return options.data.global_batch * options.data.sequence_length;
  }
  double tokens() const { return double(tokens_per_step()) * double(options.optimizer.steps); }
};

// From settings alone: nothing is run, no weight has memory. Options: micro-batches and routing
// groups fit the batch. BadSettings: sizes beyond counting.
Plan make_plan(const TrainerOptions& options, const RankLayout& layout, int64_t memory);

// Its parts. planned_bytes: rank 0's.
PlannedBytes planned_bytes(const TrainerOptions& options, const RankLayout& layout);
// 0: not even one routing group fits.
int64_t largest_micro_batch(const TrainerOptions& options, const RankLayout& layout,
                            int64_t memory);
constexpr int kMostPlannedRanks = 4096;
constexpr int64_t kMostPlannedRows = int64_t{1} << 31;  // of experts in a micro-batch, or tokens
// Among doublings of the ranks, up to kMostPlannedRanks, and all sizes of the expert group: the
// fewest ranks that fit, with the smallest such group.
std::optional<Remedy> find_layout(const TrainerOptions& options, const RankLayout& layout,
                                  int64_t memory, std::optional<Obstacle>& obstacle);

// Before any memory of a GPU is taken: an Error that says by how much, which parts are the largest,
// and which micro-batch fits, where a rank does not fit its `free` bytes.
void check_gpu_memory(const TrainerOptions& options, const RankLayout& layout, int64_t free);

std::string plan_json(const Plan& plan);  // for programs (docs/running.md)

}  // namespace moemamba
