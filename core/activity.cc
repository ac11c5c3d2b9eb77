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

const char* Activity::keep_name(std::string_view name) {
  for (auto& kept : names_) {
    const std::string_view there = kept.data();
    const std::string_view cut = name.substr(0, kept.size() - 1);
    if (there.empty()) std::ranges::copy(cut, kept.begin());
    if (there.empty() || there == cut) return kept.data();
  }
  return "";
}

void Activity::begin_collective(const char* group) {
  group_.store(group, std::memory_order_release);
  collectives_open_.fetch_add(1, std::memory_order_relaxed);
  collective_.fetch_add(1, std::memory_order_relaxed);
  progress_.fetch_add(1, std::memory_order_relaxed);
}

void Activity::end_collective() {
  collectives_open_.fetch_sub(1, std::memory_order_relaxed);
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
  const char* group = group_.load(std::memory_order_acquire);  // its letters were there before
  return {.phase = read(phase_),
          .step = read(step_),
          .layer = read(layer_),
          .collective = read(collective_),
          .group = group,
          .in_collective = read(collectives_open_) > 0,
          .rows_expected = read(rows_expected_),
          .rows_received = read(rows_received_),
          .progress = read(progress_)};
}

}  // namespace moemamba
