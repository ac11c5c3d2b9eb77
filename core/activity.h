#pragma once
#include <atomic>
#include <cstdint>

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
    int64_t step = 0;            // at hand, counted from 0
    int64_t layer = -1;          // block of the model; -1: none
    int64_t collective = 0;      // calls of communicators begun so far
    const char* group = "";      // of the latest call; the name lives as long as this object
    bool in_collective = false;  // it has begun and not ended
    int64_t rows_expected = -1, rows_received = -1;  // of the exchange at hand; -1: none
    uint64_t progress = 0;
  };

  void enter(Phase phase) { set(phase_, phase); }
  void begin_step(int64_t step) { set(step_, step); }
  void at_layer(int64_t layer) { set(layer_, layer); }
  void begin_collective(const char* group);
  void end_collective();
  void expect_rows(int64_t rows);
  void receive_rows(int64_t rows);
  Now now() const;

 private:
  template <class T>
  void set(std::atomic<T>& at, T value) {
    at.store(value, std::memory_order_relaxed);
    progress_.fetch_add(1, std::memory_order_relaxed);
  }
  std::atomic<Phase> phase_{Phase::starting};
  std::atomic<int64_t> step_{0}, layer_{-1}, collective_{0}, rows_expected_{-1}, rows_received_{-1};
  std::atomic<const char*> group_{""};
  std::atomic<int> collectives_open_{0};
  std::atomic<uint64_t> progress_{0};
};

}  // namespace moemamba
