#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/activity.h"
#include "runtime/control.pb.h"

namespace moemamba {

// A rank's side of the control protocol (docs/control_protocol.md), on a thread of its own: says
// what the rank is at, obeys orders, and ends the process when its supervisor is silent for too
// long. It never holds up training and never throws into it; what cannot be sent is kept within
// bounds, and the oldest is dropped.
class Agent {
 public:
  struct Options {
    std::string folder;  // <run>/supervisor
    std::string job;     // 32 hex digits
    int rank = 0, ranks = 1;
    std::string gpu;            // for people; empty: none
    double fence_seconds = 10;  // until a Welcome says otherwise
    // Called from the agent's thread.
    std::function<void()> stop;          // an order: end after the step at hand, with a checkpoint
    std::function<void(int code)> exit;  // ends the process at once; empty: _exit
  };
  // The calling thread is the one that trains. An Error where the run's secret cannot be read.
  explicit Agent(Options options);
  ~Agent();  // no fence from here on
  Agent(const Agent&) = delete;
  Agent& operator=(const Agent&) = delete;

  // Returns once the supervisor has taken this rank in: the attempt is the present one.
  void wait_welcome();
  int64_t generation() const;  // of the lease, by the latest that was heard
  Activity& activity();        // what the heartbeats tell

  // From the thread that trains. They allocate nothing and wait for nobody.
  struct Step {
    int64_t step = 0;
    double seconds = 0, busy_seconds = 0, exchange_seconds = 0;
    int64_t tokens = 0, rows = 0;
    double loss = 0, grad_norm = 0, lr = 0;  // rank 0
    int64_t skipped_steps = 0, failed_saves = 0;
  };
  void report(const Step& step);
  // choices: [layers, experts]. Only some of them are sent, about one a second.
  void report_choices(int64_t step, int64_t experts, const std::vector<double>& choices,
                      int64_t dropped_rows);
  void set_gpu_bytes(int64_t bytes);

  void note(const RunEvent& event);
  // The last word: sends what is left, for two seconds at most, and closes. No fence afterwards.
  void say_goodbye(Goodbye::Reason reason, const std::string& text);

 private:
  class Inner;
  std::unique_ptr<Inner> inner_;
};

}  // namespace moemamba
