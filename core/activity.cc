#include "core/activity.h"

#include <algorithm>

namespace moemamba {

const char* phase_name(Phase phase) {
  static constexpr const char* kNames[] = {"starting",   "loading",  "data",      "forward",
                                           "backward",   "exchange", "reduction", "optimizer",
                                           "evaluation", "hashing",  "saving",    "finishing"};
  const auto at = static_cast<size_t>(phase);
  return at < sizeof kNames / sizeof *kNames ? kNames[at] : "unknown";
}

int Activity::add_group(std::string_view name) {
  size_t at = 0;
  for (; at + 1 < groups_.size(); ++at) {
    auto& kept = groups_[at].name;
    const std::string_view cut = name.substr(0, kept.size() - 1), there = kept.data();
    if (there.empty()) std::ranges::copy(cut, kept.begin());
    if (there.empty() || there == cut) break;
  }
  return int(at);
}

// Its letters were there before it is the latest.
void Activity::begin_collective(int group) {
  groups_[size_t(group)].open.fetch_add(1, std::memory_order_release);
  latest_.store(group, std::memory_order_release);
  collective_.fetch_add(1, std::memory_order_relaxed);
  progress_.fetch_add(1, std::memory_order_relaxed);
}

void Activity::end_collective(int group) {
  groups_[size_t(group)].open.fetch_sub(1, std::memory_order_relaxed);
  progress_.fetch_add(1, std::memory_order_relaxed);
}

void Activity::expect_rows(int64_t rows) {
  rows_received_.store(rows < 0 ? -1 : 0, std::memory_order_relaxed);
  set(rows_expected_, rows);
}

void Activity::receive_rows(int64_t rows) {
  set(rows_received_, rows);
}

Activity::Now Activity::now() const {
  const auto read = [](const auto& at) { return at.load(std::memory_order_relaxed); };
  const auto open = std::ranges::find_if(
      groups_, [](const Group& g) { return g.open.load(std::memory_order_acquire) > 0; });
  const bool in_collective = open != groups_.end();
  const int latest = latest_.load(std::memory_order_acquire);
  const char* group = in_collective ? open->name.data()
                      : latest < 0  ? ""
                                    : groups_[size_t(latest)].name.data();
  return {.phase = read(phase_),
          .step = read(step_),
          .layer = read(layer_),
          .collective = read(collective_),
          .group = group,
          .in_collective = in_collective,
          .rows_expected = read(rows_expected_),
          .rows_received = read(rows_received_),
          .progress = read(progress_)};
}

}  // namespace moemamba
