#include "launcher/agent_outbox.h"

#include <algorithm>
#include <utility>

#include "runtime/control_wire.h"

namespace moemamba {

namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kBetweenChoices = std::chrono::seconds(1);
constexpr size_t kMostTaken = 96 << 10;  // bytes

ControlWord word_of(const Agent::Step& step, bool speaks) {
  ControlWord word;
  StepReport& report = *word.mutable_step();
  report.set_step(step.step);
  report.set_seconds(step.seconds);
  report.set_busy_seconds(step.busy_seconds);
  report.set_exchange_seconds(step.exchange_seconds);
  report.set_tokens(step.tokens);
  report.set_rows(step.rows);
  if (!speaks) return word;
  report.set_loss(step.loss);
  report.set_grad_norm(step.grad_norm);
  report.set_lr(step.lr);
  report.set_skipped_steps(step.skipped_steps);
  report.set_failed_saves(step.failed_saves);
  return word;
}

}  // namespace

bool AgentOutbox::is_kept(const ControlWord& word) {
  return word.has_event() || word.has_stack() || word.has_goodbye();
}

void AgentOutbox::add(const Agent::Step& step) {
  const std::lock_guard lock(mutex_);
  steps_[last_step_++ % kMostSteps] = step;
  first_step_ = std::max(first_step_, last_step_ - std::min<uint64_t>(last_step_, kMostSteps));
}

// Whole layers, as many as a word takes.
void AgentOutbox::add_choices(int64_t step, int64_t experts, const std::vector<double>& choices,
                              int64_t dropped_rows) {
  if (experts < 1 || choices.empty() || Clock::now() - choices_at_ < kBetweenChoices) return;
  choices_at_ = Clock::now();
  const size_t most = kMostChoices / size_t(experts) * size_t(experts);
  if (most == 0) return;
  const std::lock_guard lock(mutex_);
  choices_.step = step;
  choices_.experts = experts;
  choices_.dropped_rows = dropped_rows;
  choices_.of_experts.assign(choices.begin(),
                             choices.begin() + ptrdiff_t(std::min(most, choices.size())));
  choices_.fresh = true;
}

void AgentOutbox::add(ControlWord word) {
  const std::lock_guard lock(mutex_);
  if (words_.size() >= kMostWords) words_.pop_front();
  words_.push_back(std::move(word));
}

std::vector<ControlWord> AgentOutbox::take() {
  std::vector<ControlWord> taken;
  const std::lock_guard lock(mutex_);
  for (; first_step_ < last_step_; ++first_step_)
    taken.push_back(word_of(steps_[first_step_ % kMostSteps], speaks_));
  if (std::exchange(choices_.fresh, false)) {
    ExpertLoad& load = *taken.emplace_back().mutable_experts();
    load.set_step(choices_.step);
    load.set_layers(int32_t(choices_.of_experts.size() / size_t(choices_.experts)));
    load.set_experts(int32_t(choices_.experts));
    load.set_dropped_rows(choices_.dropped_rows);
    for (double count : choices_.of_experts) load.add_choices(uint64_t(count));
  }
  for (size_t bytes = 0; !words_.empty() && bytes < kMostTaken; words_.pop_front()) {
    bytes += words_.front().ByteSizeLong();
    taken.push_back(std::move(words_.front()));
  }
  return taken;
}

void AgentOutbox::give_back(std::vector<ControlWord> words) {
  const std::lock_guard lock(mutex_);
  while (!words.empty()) {
    ControlWord& word = words.back();
    if (is_kept(word) && words_.size() < kMostWords) words_.push_front(std::move(word));
    words.pop_back();
  }
}

bool AgentOutbox::empty() const {
  const std::lock_guard lock(mutex_);
  return words_.empty() && first_step_ == last_step_;
}

}  // namespace moemamba
