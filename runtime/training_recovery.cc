// What a training run does about a step whose loss or gradient is not finite. The step has changed
// nothing on any rank. All decisions follow from what all ranks know, so they are the same on all.
#include <algorithm>
#include <chrono>
#include <utility>

#include "runtime/training_run.h"

namespace moemamba {

namespace {

using Clock = std::chrono::steady_clock;

// Roll-backs to one checkpoint. A run that diverges has a bad step now and again, and should not go
// the same way for each of them.
constexpr int64_t kMostRollBacks = 3;
constexpr int64_t kMostSkipped = 10;  // in a row

}  // namespace

// For people, who count steps from 1.
std::string TrainingRun::place_of(int64_t k) const {
  const int64_t batch = request_.train.global_batch_size();
  return concat("step ", k + 1, " (samples ", k * batch, " to ", (k + 1) * batch - 1, ")");
}

void TrainingRun::tell(const char* kind, int64_t k, const std::string& text, double seconds) {
  warn(text);
  note(kind, k, text, seconds);
}

// Takes the step again, then the way from the newest checkpoint, then leaves its batch out.
// Nothing: `record` is now what the step was. Else the step that the loop takes next, or before
// which it ends, where it was asked to stop.
std::optional<int64_t> TrainingRun::mend(StepRecord& record) {
  const int64_t k = record.step;
  Trouble& trouble = troubles_[k];
  ++trouble.failures;
  std::string what = trainer_.blame();
  if (!trouble.rolled_back) {
    if (replay(record, what)) return std::nullopt;
    ++trouble.failures;
    what = trainer_.blame();
    if (const std::optional<int64_t> checkpoint = place_to_go_back_to()) {
      if (trainer_.stopping()) {
        // The state is still that of before the step; whether a roll-back helps, the next launch
        // finds out, which has more time.
        end_after(k);
        return k;
      }
      trouble.rolled_back = true;
      ++roll_backs_[*checkpoint];
      if (const std::optional<int64_t> back = roll_back(k, what)) return back;
    }
  }
  leave_out(k, what);
  record.skipped = trouble.skipped = true;
  return std::nullopt;
}

// True: it was a passing fault.
bool TrainingRun::replay(StepRecord& record, const std::string& what) {
  record = trainer_.step(record.step);
  const bool helped = !trainer_.skipped();
  tell("replayed", record.step,
       concat(place_of(record.step), ": not finite: ", what, "; taken again, it is ",
              helped ? "finite" : "not finite either"));
  return helped;
}

// The checkpoint that a roll-back would load, as far as this launch knows. None behind a step that
// was left out: the state is the one that this step's own way has led to.
std::optional<int64_t> TrainingRun::place_to_go_back_to() {
  if (skipped_in_a_row_ > 0) return std::nullopt;
  checkpoints_->finish();  // from here on all ranks know of the same saves
  const int64_t newest = checkpoints_->newest();
  if (newest < 0 || roll_backs_[newest] >= kMostRollBacks) return std::nullopt;
  return newest;
}

std::optional<int64_t> TrainingRun::roll_back(int64_t k, const std::string& what) {
  const auto start = Clock::now();
  trainer_.rest();
  const auto found = load("went back  ");
  if (!found) return std::nullopt;  // somebody has removed it
  for (auto at = troubles_.lower_bound(found->step()); at != troubles_.end(); ++at)
    skipped_steps_ -= std::exchange(at->second.skipped, false);
  if (metrics_) metrics_->cut(found->step());
  if (sample_lines_) sample_lines_->cut(found->step());
  if (tensorboard_) tensorboard_->go_back_to(found->step());
  const std::chrono::duration<double> took = Clock::now() - start;
  tell("rolled_back", k,
       concat(place_of(k), ": not finite, also when taken again: ", what,
              "; back at the checkpoint after step ", found->step(), ", and on from there"),
       took.count());
  return found->step();
}

void TrainingRun::leave_out(int64_t k, const std::string& what) {
  const std::string tried =
      concat("not finite: ", what, ", also when taken again",
             troubles_[k].rolled_back ? " and on the way from the newest checkpoint" : "");
  const bool stops = request_.train.on_nonfinite() == TrainConfig::STOP;
  const bool many = ++skipped_in_a_row_ >= kMostSkipped;
  if (stops || many) checkpoints_->finish();  // a save that is on its way is worth waiting for
  if (stops)
    throw RunEnds(concat(place_of(k), ": ", tried, "; train.on_nonfinite=STOP ends the run here. ",
                         "Look at these samples, try a lower train.lr or train.grad_clip, or ",
                         "leave the samples out: --train.on_nonfinite=SKIP"));
  if (many)
    throw RunEnds(concat("steps ", k - kMostSkipped + 2, " to ", k + 1,
                         ": loss or gradient is not finite (in the last one: ", what,
                         "); no parameter was changed by them. Try a lower train.lr or a lower ",
                         "train.grad_clip"));
  ++skipped_steps_;
  tell("skipped", k, concat(place_of(k), ": ", tried, "; left out, no parameter is changed by it"));
}

}  // namespace moemamba
