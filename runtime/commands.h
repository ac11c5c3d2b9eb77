#pragma once
#include <functional>
#include <string>

#include "runtime/run_ends.h"
#include "core/file.h"
#include "model/model_config.pb.h"
#include "parallel/groups.h"
#include "parallel/parallel_config.pb.h"
#include "runtime/control.pb.h"
#include "runtime/evaluate.h"
#include "runtime/generate.h"
#include "runtime/metrics.h"
#include "runtime/train_config.pb.h"

namespace moemamba {

// What `moemamba train`, `evaluate` and `generate` do once settings are read and ranks are there.
// Every rank calls them; rank 0 writes and prints.
struct TrainRequest {
  ModelConfig model;
  ParallelConfig parallel;
  TrainConfig train;
  DataConfig data;
  CheckpointConfig checkpoint;
  std::string run;            // folder; one that holds the same run goes on with it
  bool overwrite = false;     // start anew where the folder holds a run
  bool fresh = false;         // start at step 0 in an empty folder, or not at all
  std::string init_from;      // weights to start from; empty: random ones
  std::string resolved_text;  // all settings as text: kept in the run's folder
  std::string build;          // facts of the program: kept in checkpoints
  int threads = 1;            // of this rank
  bool terminal = false;      // progress on one line
  bool color = false;
  int columns = 0;  // width of the terminal, 0 = not known
  // True on any rank: the run ends after the step at hand, with its weights. Empty: never.
  std::function<bool()> stop_wanted;
  // What people want to know later; on rank 0 alone, from the thread that trains. Empty: nobody.
  std::function<void(const RunEvent&)> on_event;
  // Where a supervisor holds the lease of the run's folder: its generation now. Rank 0 then takes
  // no lease, and commits while that one is the newest. Empty: rank 0 takes a lease of its own.
  std::function<int64_t()> lease_generation;
  // A step that has ended, with the time that this rank has waited for others in it; on every rank.
  // Rank 0 gets the choices of all experts, [routers, E], with it.
  std::function<void(const StepRecord&, const std::vector<double>& choices)> on_step;
  // Drills: those of TrainerOptions, of this rank.
  std::function<bool(int64_t step)> spoil;
  std::function<void(int64_t step)> before_step;
  std::function<void(int64_t step, double seconds)> before_verdict;
};

struct TrainResult {
  std::optional<Evaluation> evaluation;  // the last one; without held-out text: none
  bool stopped = false;                  // before its last step, as asked
};
// Leaves config.textproto, metrics.jsonl, samples.jsonl, tensorboard/, loss.svg, experts.txt,
// checkpoints/ and weights/ in the run's folder.
TrainResult run_training(FileSystem& files, ProcessGroups& groups, const TrainRequest& request);

struct UseRequest {
  ModelConfig model;
  ParallelConfig parallel;
  TrainConfig train;  // sequence_length, micro_batch_size, routing_group, eval_tokens
  DataConfig data;    // validation: what is evaluated; tokenizer
  std::string weights;
  int threads = 1;
};
Evaluation run_evaluation(ProcessGroups& groups, const UseRequest& request);
// The prompt and what follows it goes to `out` as it appears.
std::string run_generation(ProcessGroups& groups, const UseRequest& request,
                           const std::string& prompt, const SamplingOptions& options, FILE* out);

// The tokenizer of a run, once its token files are known to be of use with it.
std::optional<Tokenizer> checked_tokenizer(const DataConfig& data, const ModelConfig& model,
                                           bool trains);
// Of the tokenizer; 0 and -1 where there is none.
int64_t vocabulary_of(const std::optional<Tokenizer>& tokenizer);
int32_t end_of_document_of(const std::optional<Tokenizer>& tokenizer);
EvaluatorOptions evaluator_options(const TrainConfig& train,
                                   const std::optional<Tokenizer>& tokenizer);

// "bytes" or a file; nothing for "none".
std::optional<Tokenizer> open_tokenizer(const std::string& setting);

// Share of the choices of each expert, one line per MoE layer, for people.
std::string expert_table(const std::vector<double>& counts, int64_t experts);

}  // namespace moemamba
