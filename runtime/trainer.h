#pragma once
#include <functional>

#include "parallel/parallel_config.pb.h"
#include "runtime/data.h"
#include "runtime/metrics.h"
#include "runtime/session.h"
#include "runtime/train_config.pb.h"

namespace moemamba {

struct TrainerOptions {
  ModelSizes sizes;
  OptimizerSettings optimizer;
  DataOptions data;  // sequence_length, global_batch and seed of the run
  int64_t micro_batch = 0;
  int64_t routing_group = 1;
  int64_t sample_tokens = 0;  // of texts between steps (samples.h), for the plan
  double exchange_rows = 1.25;
  int threads = 1;
  uint64_t seed = 42;
  DeviceKind device = DeviceKind::cpu;  // what is planned for; a trainer works where its groups do
  // Drill: where true, one element of this rank's gradient becomes NaN before the reduction of the
  // step. Asked once for each attempt at it. Empty: never.
  std::function<bool(int64_t step)> spoil = {};
  // Drills, on the thread that trains: at the begin of an attempt at a step; and before what the
  // ranks tell each other at its end, with the seconds that this one has computed. Empty: nothing.
  std::function<void(int64_t step)> before_step = {};
  std::function<void(int64_t step, double seconds)> before_verdict = {};
};
OptimizerSettings optimizer_settings(const TrainConfig& config);
// All but `threads` and what belongs to files and their tokens.
TrainerOptions trainer_options(const ModelSizes& sizes, const ParallelConfig& parallel,
                               const TrainConfig& train);

// The buffers of a rank's micro-batch and of a step's facts.
struct StepBuffers {
  int64_t ids, targets, starts, facts, gathered, small;
  int64_t bytes() const { return ids + targets + starts + facts + gathered + small; }
};
StepBuffers step_buffers(const TrainerOptions& options, int64_t micro_batch, int ranks);

// What one rank's trainer holds from before its first step to its end. Operators' scratch
// (Stream::workspace) comes on top.
struct TrainerBytes {
  int64_t values = 0, gradients = 0, moments = 0, reduction = 0, activations = 0, batch = 0;
  int64_t total() const { return values + gradients + moments + reduction + activations + batch; }
  bool operator==(const TrainerBytes&) const = default;
};

// One rank's part of the training step (house.md, "One step").
class Trainer {
 public:
  Trainer(ProcessGroups& groups, const TrainerOptions& options);
  ~Trainer();  // waits for what is on its way

  // Step k, counted from 0. The same record on every rank. Where a gradient, a loss or a router's
  // logit is not finite on any rank, no rank changes anything and skipped() is true. A rank that
  // throws has aborted its groups before, for its own communication stream waits for the others.
  StepRecord step(int64_t k);
  bool skipped() const { return skipped_; }
  // After a step that was skipped(): what was not finite, on which ranks, as far as it can be told
  // ("loss of rank 1"). Every rank calls it and gets the same.
  std::string blame();
  // The next step tells all ranks, which have stopping() true from its end on, wherever this was
  // called.
  void ask_to_stop() { stop_wanted_ = true; }
  bool stopping() const { return stopping_; }

  // Choices of the latest step, [routers, E], over all ranks.
  const std::vector<double>& expert_counts() const { return counts_; }
  void wait_weights();  // the newest values of all parameters are there
  void rest();          // and nothing of this rank is under way: others may change the state
  // No step changes parameters or moments before this is past.
  void hold_state(Event until) { held_until_ = until; }
  Session& session() { return session_; }
  const TrainerOptions& options() const { return options_; }
  const BatchShare& share() const { return share_; }
  TrainerBytes bytes() const;

 private:
  StepRecord take_step(int64_t k);
  // A micro-batch where the host writes it, and where the model reads it: the same on the CPU.
  struct Tokens {
    Tensor ids, targets, starts;
  };
  Tokens device_tokens(int64_t tokens) const;
  Tokens host_tokens(int64_t tokens, int slot) const;
  Tokens fill_tokens(int64_t k, int64_t index, int64_t count);
  void micro_batch(int64_t k, int64_t index, StepSeconds& seconds);
  void wait_reduction(StepSeconds& seconds);
  void enter(Phase phase) const;
  double waited() const;  // so far, as far as somebody watches this rank
  void spoil_gradient();
  int32_t own_trouble();
  Tensor fact(int which) const;  // [1] f64, where the model works
  void share_facts(StepRecord& record);
  void judge(StepRecord& record);

  TrainerOptions options_;
  BatchShare share_;
  Session session_;
  GradientBuckets buckets_;
  Optimizer optimizer_;
  Batches data_;
  Buffer ids_, targets_, starts_, facts_buffer_, gather_buffer_, small_;
  Buffer staging_;  // of a GPU's trainer: the host's side of two micro-batches, facts and verdict
  Event uploaded_[2];
  Tensor facts_tensor_, host_facts_, verdict_, host_verdict_;
  RoutingFacts routing_;
  std::vector<double> counts_;
  Event held_until_;
  std::shared_ptr<void> reduction_begins_, reduction_ends_;  // marks of a GPU that is watched
  bool skipped_ = false, stop_wanted_ = false, stopping_ = false;
};

// Fills load_max_over_mean and dead_experts from choices [routers, E].
void describe_load(const std::vector<double>& counts, int64_t experts, StepRecord& record);

}  // namespace moemamba
