#pragma once
#include <map>

#include "runtime/checkpoints.h"
#include "runtime/commands.h"
#include "runtime/lease.h"
#include "runtime/progress.h"
#include "runtime/samples.h"
#include "runtime/state_hash.h"
#include "runtime/tensorboard.h"
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
  bool has_own_checkpoint();
  void take_weights();
  void take_folder();
  void resume();
  std::optional<CheckpointManifest> load(std::string_view heading);
  bool may_write() const;
  void check_may_write() const;
  void open_reports();
  void open_checkpoints();
  void introduce();

  // After each.
  void after_step(StepRecord& record);
  void evaluate(StepRecord& record);
  void write_sample(int64_t k);
  void link(StepRecord& record);
  void save_checkpoint(int64_t done);
  void end_after(int64_t done);
  bool begins_anew();
  void save_weights_of(int64_t step);
  bool has_weights_of(int64_t step) const;
  void conclude(int64_t step);
  void finish();

  // About steps that are not finite (training_recovery.cc). Every rank decides alike.
  struct Trouble {
    int64_t failures = 0;  // attempts
    bool rolled_back = false, skipped = false;
  };
  std::optional<int64_t> mend(StepRecord& record);
  bool replay(StepRecord& record, const std::string& what);
  std::optional<int64_t> place_to_go_back_to();
  std::optional<int64_t> roll_back(int64_t k, const std::string& what);
  void leave_out(int64_t k, const std::string& what);
  std::string place_of(int64_t k) const;
  void tell(const char* kind, int64_t k, const std::string& text, double seconds = 0);
  // For TrainRequest::on_event alone: what people have been told already.
  void note(const char* kind, int64_t step, const std::string& text, double seconds = 0);
  void note_save(const Checkpoints::Ended& save);

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
  std::optional<Samples> samples_;
  std::optional<MetricsWriter> metrics_;
  std::optional<LineFile> sample_lines_;
  std::optional<TensorboardWriter> tensorboard_;
  std::optional<Progress> progress_;
  std::optional<Checkpoints> checkpoints_;
  std::optional<Evaluation> evaluation_;
  std::map<int64_t, Trouble> troubles_;    // of this launch, by step
  std::map<int64_t, int64_t> roll_backs_;  // by the step of the checkpoint that was to be loaded
  int64_t skipped_in_a_row_ = 0, skipped_steps_ = 0;
  double last_loss_ = 0;  // of a step that was applied
};

}  // namespace moemamba
