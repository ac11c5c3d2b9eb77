#include "launcher/supervisor/status_facts.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"

namespace moemamba {

const char* name_of(RunState state) {
  static constexpr const char* kNames[] = {"starting", "training", "stopping", "recovering",
                                           "done",     "stopped",  "failed"};
  return kNames[size_t(state)];
}

const char* name_of(RankState state) {
  static constexpr const char* kNames[] = {"absent", "alive", "silent", "hanging", "ended"};
  return kNames[size_t(state)];
}

Health health_of(const RunView& view) {
  if (view.state == RunState::failed)
    return {false,
            concat("failed: ", view.state_text.empty() ? "no reason is known" : view.state_text)};
  if (!view.trouble.empty()) return {false, view.trouble};
  // One that is ended because it hung needs nobody any more.
  const bool works = view.state == RunState::starting || view.state == RunState::training ||
                     view.state == RunState::stopping;
  for (const RankView& rank : view.of_ranks)
    if (works && rank.state == RankState::hanging)
      return {false, concat("hanging: rank ", rank.rank, " makes no progress in step ",
                            rank.activity.step + 1, ", phase ", phase_name(rank.activity.phase))};
  return {true, name_of(view.state)};
}

RunProgress progress_of(const RunView& view, const RunRecords::State& records) {
  RunProgress progress;
  if (!view.of_ranks.empty() && view.of_ranks[0].step >= 0) {
    progress.steps_done = view.of_ranks[0].step + 1;
    progress.step_seconds = view.of_ranks[0].step_seconds;
  } else if (records.latest) {
    progress.steps_done = records.latest->step + 1;
  }
  const double tokens = double(view.global_batch) * double(view.sequence_length);
  if (records.tokens_per_second > 0 && tokens > 0)
    progress.step_seconds = tokens / records.tokens_per_second;
  const int64_t left = std::max<int64_t>(0, view.steps - progress.steps_done);
  if (progress.step_seconds > 0) progress.eta_seconds = double(left) * progress.step_seconds;
  return progress;
}

LayerLoad load_of(const ExpertView& experts, int layer) {
  const uint64_t* choices = experts.choices.data() + size_t(layer) * size_t(experts.experts);
  double sum = 0;
  for (int e = 0; e < experts.experts; ++e) sum += double(choices[e]);
  LayerLoad load;
  load.dead = int(std::count(choices, choices + experts.experts, 0u));
  if (sum == 0) return load;
  const double mean = sum / experts.experts;
  double squares = 0;
  for (int e = 0; e < experts.experts; ++e)
    squares += (double(choices[e]) / mean - 1) * (double(choices[e]) / mean - 1);
  load.most = double(*std::max_element(choices, choices + experts.experts)) / mean;
  load.least = double(*std::min_element(choices, choices + experts.experts)) / mean;
  load.variation = std::sqrt(squares / experts.experts);
  return load;
}

}  // namespace moemamba
