#pragma once
#include "runtime/checkpoints.h"
#include "runtime/commands.h"
#include "runtime/lease.h"
#include "runtime/progress.h"
#include "runtime/state_hash.h"
#include "runtime/trainer.h"

namespace moemamba {

// One training run on one rank: the loop around Trainer::step, from step 0 or from a checkpoint.
class TrainingRun {
 public:
  TrainingRun(FileSystem& files, ProcessGroups& groups, const TrainRequest& request);
  TrainResult go();

 private:
  bool speaks() const { return groups_.rank == 0; }
  void say(const std::string& line);
  void warn(const std::string& line);

  // Before the first step.
  void open_evaluation();
  void take_folder();
  void resume();
  void open_reports();
  void open_checkpoints();
  void introduce();

  // After each.
  void after_step(StepRecord& record);
  void report(const StepRecord& record, bool ends);
  void evaluate(StepRecord& record);
  void link(StepRecord& record);
  void save_checkpoint(const StepRecord& record);
  void save_weights_of(int64_t step);
  bool has_weights_of(int64_t step) const;
  void conclude(int64_t step);
  void finish();

  FileSystem& files_;
  ProcessGroups& groups_;
  const TrainRequest& request_;
  std::optional<Tokenizer> tokenizer_;  // data.tokenizer may be "none"
  Trainer trainer_;
  StateHasher hasher_;
  std::string devices_;  // GPUs, for people
  double bytes_per_token_ = 0;
  std::optional<Evaluator> evaluator_;
  std::unique_ptr<Lease> lease_;  // rank 0
  std::string run_id_;
  int64_t first_step_ = 0, generation_ = 0, loaded_step_ = -1;
  HashChain chain_;
  std::optional<MetricsWriter> metrics_;
  std::optional<Progress> progress_;
  std::optional<Checkpoints> checkpoints_;
  std::optional<Evaluation> evaluation_;
  int64_t skipped_in_a_row_ = 0;
};

}  // namespace moemamba
