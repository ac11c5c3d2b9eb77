#pragma once
#include <array>
#include <chrono>
#include <deque>
#include <mutex>
#include <vector>

#include "launcher/agent.h"

namespace moemamba {

// What a rank has to say and has not said yet, within bounds. One thread fills it, without ever
// allocating for a step, another one empties it.
class AgentOutbox {
 public:
  explicit AgentOutbox(bool speaks) : speaks_(speaks) {}

  void add(const Agent::Step& step);
  void add_choices(int64_t step, int64_t experts, const std::vector<double>& choices,
                   int64_t dropped_rows);
  void add(ControlWord word);  // an event, a stack or a goodbye: kept longest

  // Words to send now, oldest first, of some 100 KiB at most. Those that were taken and did not
  // reach anybody come back with give_back().
  std::vector<ControlWord> take();
  void give_back(std::vector<ControlWord> words);  // steps among them are dropped
  bool empty() const;
  static bool is_kept(const ControlWord& word);  // it comes back

 private:
  static constexpr size_t kMostSteps = 256, kMostWords = 1000;
  bool speaks_;  // rank 0
  mutable std::mutex mutex_;
  std::array<Agent::Step, kMostSteps> steps_;  // a ring: numbers first_step_ .. last_step_ - 1
  uint64_t first_step_ = 0, last_step_ = 0;
  std::deque<ControlWord> words_;
  struct Choices {
    int64_t step = -1, experts = 0, dropped_rows = 0;
    std::vector<double> of_experts;
    bool fresh = false;
  } choices_;
  std::chrono::steady_clock::time_point choices_at_{};
};

}  // namespace moemamba
