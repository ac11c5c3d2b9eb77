#pragma once
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <string_view>

namespace moemamba {

// What a rank is at.
enum class Phase : int32_t {
  starting,  // before its first step: MPI, files, memory
  loading,   // a checkpoint or weights
  data,
  forward,
  backward,
  exchange,   // rows to experts or back
  reduction,  // of gradients, norm and verdict
  optimizer,
  evaluation,  // held-out text, sample text
  hashing,     // of the whole state
  saving,      // waits for a checkpoint
  finishing,   // after the last step
};
const char* phase_name(Phase phase);

// What a rank is doing at this moment: written by the threads that do it, read by the one that
// tells others (a heartbeat). No order between the fields is promised; a reader sees each as it was
// a moment ago. Every change counts as progress.
class Activity {
 public:
  // One reading.
  struct Now {
    Phase phase = Phase::starting;
    int64_t step = 0;        // at hand, counted from 0
    int64_t layer = -1;      // block of the model; -1: none
    int64_t collective = 0;  // calls of communicators begun so far
    // Of the call that has begun and not ended, where there is one; of several the one whose group
    // was added first. Else of the latest. The name lives as long as this object.
    const char* group = "";
    bool in_collective = false;
    int64_t rows_expected = -1, rows_received = -1;  // of the exchange at hand; -1: none
    uint64_t progress = 0;
  };

  void enter(Phase phase) { set(phase_, phase); }
  void begin_step(int64_t step) { set(step_, step); }
  void at_layer(int64_t layer) { set(layer_, layer); }
  // A group's number for the calls below; the same name is the same group. Names are kept here, for
  // whoever reads them may outlive the group. Before any such call; all past the seventh are one.
  int add_group(std::string_view name);
  void begin_collective(int group);
  void end_collective(int group);
  void expect_rows(int64_t rows);
  void receive_rows(int64_t rows);
  // The thread that trains has waited for other ranks. Counts on, and is no progress.
  void add_waited(std::chrono::nanoseconds time) {
    waited_.fetch_add(time.count(), std::memory_order_relaxed);
  }
  std::chrono::nanoseconds waited() const {
    return std::chrono::nanoseconds(waited_.load(std::memory_order_relaxed));
  }
  Now now() const;
  Phase phase() const { return phase_.load(std::memory_order_relaxed); }

 private:
  template <class T>
  void set(std::atomic<T>& at, T value) {
    at.store(value, std::memory_order_relaxed);
    progress_.fetch_add(1, std::memory_order_relaxed);
  }
  std::atomic<Phase> phase_{Phase::starting};
  std::atomic<int64_t> step_{0}, layer_{-1}, collective_{0}, rows_expected_{-1}, rows_received_{-1};
  struct Group {
    std::array<char, 24> name{};
    std::atomic<int> open{0};  // calls that have begun and not ended
  };
  std::array<Group, 8> groups_{};
  std::atomic<int> latest_{-1};  // names are read once they are of a call
  std::atomic<uint64_t> progress_{0};
  std::atomic<int64_t> waited_{0};
};

// In a phase from here to the end of the scope, then in the one before again. null: nobody reads.
class InPhase {
 public:
  InPhase(Activity* activity, Phase phase)
      : activity_(activity), before_(activity ? activity->phase() : phase) {
    if (activity_) activity_->enter(phase);
  }
  ~InPhase() {
    if (activity_) activity_->enter(before_);
  }
  InPhase(const InPhase&) = delete;
  InPhase& operator=(const InPhase&) = delete;

 private:
  Activity* activity_;
  Phase before_;
};

}  // namespace moemamba
