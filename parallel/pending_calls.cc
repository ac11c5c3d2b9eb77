#include "parallel/pending_calls.h"

#include "core/error.h"

namespace moemamba {

void PendingCalls::add() {
  check(!full(), "more than ", kMost, " calls of a group on their way: look() first");
  since_[size_t(next())].reset();
  ++last_;
}

bool PendingCalls::look() {
  for (; first_ < last_; ++first_) {
    const auto place = int(first_ % kMost);
    std::optional<Clock::time_point>& since = since_[size_t(place)];
    if (marks_.done(place)) {
      marks_.ended(place);
      continue;
    }
    if (!since && marks_.begun(place)) since = marks_.now();
    return since && marks_.now() - *since > deadline_;
  }
  return false;
}

}  // namespace moemamba
