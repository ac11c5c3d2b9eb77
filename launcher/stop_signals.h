#pragma once
#include <signal.h>

#include <atomic>
#include <chrono>
#include <string>
#include <thread>

namespace moemamba {

// SIGTERM and SIGUSR1 that come so soon after the first signal are the same word again: a scheduler
// that ends a job sends two of a kind to some of its processes.
constexpr std::chrono::seconds kRepeatedSignals(2);

// While it lives, the first SIGINT, SIGTERM or SIGUSR1 only asks this process to stop, which says
// `notice` on standard error; the next one that is no repetition ends it as ever. Afterwards they
// are ignored, unless an exception is on its way: a process that has done its work must not die of
// them on its way out. A signal that the process ignored before stays ignored. REQUIRES: made
// before other threads of this program (those of libraries that start before main() may be there).
class StopSignals {
 public:
  explicit StopSignals(std::string notice);
  StopSignals(const StopSignals&) = delete;
  StopSignals& operator=(const StopSignals&) = delete;
  ~StopSignals();
  int received() const { return received_; }  // the first one; 0: none yet

 private:
  void watch();
  bool outlasts_repeats();
  sigset_t signals_, before_;
  std::string notice_;
  std::atomic<int> received_ = 0;
  std::atomic<bool> ends_ = false;
  std::thread watcher_;
};

// SIGINT, SIGTERM and SIGUSR1, without those that this process ignores: a shell starts its
// background commands so that the terminal's Ctrl-C passes them by.
sigset_t stop_signals();
const char* signal_name(int signal);  // "SIGINT"

}  // namespace moemamba
