#pragma once
#include <array>
#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>

namespace moemamba {

// A group's calls that a device has still to do, oldest first. Each has a place, 0 .. kMost - 1,
// with two marks in the device's work: one before the call and one behind it. A call is late when
// the mark behind it does not follow the one before it within the deadline: what the device has to
// do earlier does not count. No call is without a place: where all are taken, the caller looks
// until the oldest call has ended or is late.
class PendingCalls {
 public:
  using Clock = std::chrono::steady_clock;
  static constexpr int kMost = 64;
  struct Marks {
    std::function<bool(int place)> begun, done;  // the device is past that mark
    std::function<void(int place)> ended;        // told once of every call, in order
    std::function<Clock::time_point()> now = Clock::now;
  };
  PendingCalls(Marks marks, Clock::duration deadline)
      : marks_(std::move(marks)), deadline_(deadline) {}

  bool full() const { return last_ - first_ == kMost; }
  int next() const { return int(last_ % kMost); }  // the next call's place. REQUIRES: not full
  void add();  // the call in that place is enqueued, and so are both its marks

  // Lets go of the calls that have ended. True: the oldest of the others is late. Calls of one
  // stream end in order; those of two streams are looked at in the order in which they were added.
  bool look();

 private:
  Marks marks_;
  Clock::duration deadline_;
  std::array<std::optional<Clock::time_point>, kMost> since_;  // seen to have begun
  uint64_t first_ = 0, last_ = 0;  // calls of numbers first_ .. last_ - 1 are on their way
};

}  // namespace moemamba
