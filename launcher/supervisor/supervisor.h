#pragma once
#include <boost/asio/io_context.hpp>
#include <boost/asio/signal_set.hpp>
#include <chrono>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "core/file.h"
#include "launcher/run_config.pb.h"
#include "launcher/supervisor/alarm.h"
#include "launcher/supervisor/control_server.h"
#include "launcher/supervisor/event_log.h"
#include "launcher/supervisor/job.h"
#include "launcher/supervisor/job_state.h"
#include "launcher/supervisor/leftovers.h"
#include "launcher/supervisor/recovery.h"
#include "launcher/supervisor/run_view.h"
#include "launcher/supervisor/status_server.h"
#include "launcher/supervisor/watch.h"
#include "runtime/lease.h"

namespace moemamba {

struct LaunchRequest {
  RunConfig config;
  int ranks = 1;
  std::vector<HostSlots> hosts;           // where to; empty: this machine
  std::vector<std::string> srun_options;  // in a Slurm allocation; empty: mpirun starts the ranks
  bool fresh = false;                     // only in an empty folder
  std::vector<std::string> words;         // of every rank: "train", ...
};

// Keeps a run going until it is done, is asked to stop, or cannot go on; returns the exit code
// (docs/running.md). One thread: processes, sockets and signals meet in one context; what to do
// about them is decided by Watch and Recovery.
class Supervisor {
 public:
  explicit Supervisor(LaunchRequest request);
  ~Supervisor();
  int run();

 private:
  enum class Doing { running, ending, pausing, over };
  // What is known of a rank beside the view.
  struct RankLink {
    bool local = false;   // a process of this machine, in sight
    std::string address;  // that it connects from
    std::unique_ptr<ProcessEnd> end;
    bool process_ended = false;
    bool closed = false;  // its connection is, and it has not come back
    std::unique_ptr<Alarm> patience;
    std::optional<Goodbye> goodbye;
  };

  double now() const;

  // supervisor.cc: beginning, and the rounds of a timer.
  void open();
  void open_status(bool needed);
  bool go_on_with(const JobState& before);
  void mark_overwriting(const std::optional<JobState>& before);
  std::vector<std::string> command_words() const;  // of the ranks, and how many are asked for
  void look_at_checkpoints();
  bool is_finished() const;
  bool says_finished() const;
  void begin_attempt();
  void start_ranks();
  std::vector<std::string> command_of_attempt();
  void reset_view(int ranks, int expert);
  void remember(bool running);
  void tick();
  bool replaced();
  void wait_for_signals();
  void next_signal();
  void stop_asked(int signal);
  void order_stop();
  void end_early(const std::string& text);
  double seconds_to_save() const;

  // supervisor_ranks.cc: what ranks say.
  void joined(const Hello& hello, const std::string& address);
  void said(int rank, const ControlWord& word);
  void heard(int rank, const Heartbeat& beat);
  void stepped(int rank, const StepReport& report);
  void event(const RunEvent& event);
  void closed(int rank);
  void process_ended(int rank);
  void goodbye(int rank, const Goodbye& word);
  void gone(int rank);

  // supervisor_end.cc: the end of an attempt.
  struct Fault {
    AttemptEnd::Kind kind = AttemptEnd::Kind::lost;
    int rank = -1;  // whose; -1: not known
    std::string event = "lost";
    std::string text;
    bool asks_stack = false;
  };
  void job_ended();
  void judge();
  void end_attempt(Fault fault);
  std::string process_text(int rank) const;
  void got_stack(const std::vector<std::string>& frames);
  void kill_all(std::function<void()> gone);
  void kill_round();
  ControlWord end_order() const;
  bool others_gone();
  std::string listed_host(int rank) const;
  std::string listed_name_of_this_host() const;
  std::vector<std::string> hosts_at_fault() const;
  void conclude();
  void say_report();
  void restart(const Verdict& verdict);
  void finish(int exit_code, const std::string& kind, const std::string& text, bool gone = true);
  int64_t step_at_hand() const;
  int64_t steps_unheard() const;
  int early_exit_code() const;
  std::string early_text() const;
  std::string place_to_go_on() const;

  const LaunchRequest request_;
  const LaunchConfig& launch_;
  const std::string run_, folder_;  // the latter: <run>/supervisor
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  PosixFileSystem files_;
  boost::asio::io_context context_;
  Alarm ticks_{context_}, act_{context_}, stop_{context_};
  boost::asio::signal_set signals_{context_};
  RunView view_;
  Outlet outlet_{2};
  EventLog events_;
  std::unique_ptr<Lease> lease_;
  std::string run_key_;
  std::unique_ptr<ControlServer> server_;
  std::unique_ptr<StatusServer> status_;  // null: not wanted
  Job job_{context_};
  LogFollower log_;
  Leftovers leftovers_;
  JobState state_;
  std::unique_ptr<Recovery> recovery_;
  std::unique_ptr<Watch> watch_;
  std::vector<RankLink> links_;
  Doing doing_ = Doing::pausing;
  Fault fault_;                     // of the attempt that ends
  std::vector<std::string> stack_;  // of its culprit
  std::vector<std::string> unreachable_;
  // Processes that do not die and are not waited for any more; of the attempt that ends, in words.
  std::set<std::pair<pid_t, int64_t>> given_up_;
  std::string stuck_;
  std::function<void()> gone_;  // what comes when nothing is left of it
  double ended_at_ = 0;         // since when the attempt before has been at its end; 0: none was
  double ending_since_ = 0;
  double fenced_at_ = 0;  // when ranks elsewhere that were never heard of have ended themselves
  bool stuck_said_ = false;
  int64_t last_step_ = -1;  // the furthest that ever ended
  bool adopted_ = false;    // the attempt at hand was begun by another supervisor
  bool stepped_ = false;    // a step of this attempt has ended
  int signals_got_ = 0, first_signal_ = 0, last_signal_ = 0;
  double first_signal_at_ = 0;
  double stop_deadline_ = 0;
  double give_up_at_ = 0;  // after a signal: when nothing is waited for any more
  int64_t ticks_made_ = 0;
  int exit_code_ = 1;
};

}  // namespace moemamba
