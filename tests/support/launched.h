#pragma once
#include <sys/types.h>

#include <chrono>
#include <string>
#include <vector>

#include "tests/support/hosts.h"
#include "tests/support/processes.h"

namespace moemamba {

// A line of <run>/events.jsonl.
struct LoggedEvent {
  std::string kind, job, text;
  int64_t step = -1;
  double wall = 0;  // since 1970
};

// What became of a run after a fault: seconds since then.
struct Outcome {
  double found = -1;      // to the event that tells of it; negative: there was none
  double next_step = -1;  // to the first step of the attempt that followed; negative: none came
  int64_t lost = 0;       // steps that were taken again
  LoggedEvent event;      // that told of it
  bool went_on() const { return next_step >= 0; }
};

// One run under `moemamba launch`, seen from outside: by its files and its processes.
class Launched {
 public:
  using Clock = std::chrono::steady_clock;

  // words: all that follows "launch", with --run=`run` among them. folder: working directory; what
  // the supervisors print is added to the file `said` there. hosts: the supervisor runs on host 0
  // of these.
  Launched(std::string folder, std::string run, std::string words, const Hosts* hosts = nullptr,
           std::string said = "said");
  ~Launched();  // kills all processes of the run, unless it was told to forget them
  void forget() { forgets_ = true; }
  Launched(const Launched&) = delete;
  Launched& operator=(const Launched&) = delete;

  // The command: the first time, or again after its supervisor has ended. From the main thread: the
  // supervisor dies with the thread that started it.
  void start();
  pid_t supervisor() const { return supervisor_; }  // 0: it has ended, and end() was called
  bool has_ended() const;
  // Waits for the supervisor's end: its exit code, or minus the signal. kNoEnd: it had not ended in
  // time, and was killed.
  static constexpr int kNoEnd = -1000;
  int end(double seconds);
  void kill_supervisor();  // SIGKILL, and waits until it is gone

  const std::string& run() const { return run_; }
  std::string said() const;
  int64_t steps() const;                                                // that metrics.jsonl has
  int64_t attempt() const;                                              // of the ranks' starts
  std::vector<LoggedEvent> events(const std::string& kind = "") const;  // empty: all
  bool is_saved() const;                                                // a checkpoint is there
  Processes processes() const;                // supervisors are its `launchers`
  std::vector<pid_t> processes_left() const;  // of the run, on any host, without the supervisor

  // Waits for so many further steps, or an attempt's first ones; false: not in time.
  bool wait_for_steps(int64_t more, double seconds) const;

  // To be taken just before a fault; go_on_after then follows the run until it goes on, its
  // supervisor has ended, or `seconds` have passed. REQUIRES: it had a checkpoint.
  struct Before {
    Clock::time_point time;
    double wall = 0;
    int64_t attempt = 0, steps = 0;
    size_t events = 0;
  };
  Before before() const;
  Outcome go_on_after(const Before& before, double seconds) const;

 private:
  std::string file(const std::string& name) const;
  std::string folder_, run_, words_, said_;
  const Hosts* hosts_;
  bool forgets_ = false;
  pid_t supervisor_ = 0;
};

// Waits for `holds`, at most so long; returns whether it came to hold.
template <class Holds>
bool wait_until(Holds&& holds, double seconds);
void pause_for(double seconds);

template <class Holds>
bool wait_until(Holds&& holds, double seconds) {
  const auto start = std::chrono::steady_clock::now();
  while (!holds()) {
    if (std::chrono::steady_clock::now() - start > std::chrono::duration<double>(seconds))
      return false;
    pause_for(0.005);
  }
  return true;
}

}  // namespace moemamba
