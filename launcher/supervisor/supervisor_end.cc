// The end of an attempt: who is at fault, nothing is left of it, what comes next.
#include <signal.h>

#include <algorithm>
#include <set>

#include "core/error.h"
#include "launcher/launch.h"
#include "launcher/process_sweep.h"
#include "launcher/supervisor/hosts.h"
#include "launcher/supervisor/stack_text.h"
#include "launcher/supervisor/supervisor.h"
#include "runtime/process_facts.h"

namespace moemamba {

namespace {

constexpr double kLastWords = 0.05;  // of ranks, after mpirun's end
constexpr double kStackWait = 2;
constexpr double kSymbols = 3;  // for their names, while the processes end
constexpr double kKillRound = 0.02;
constexpr double kReportDelay = 0.05;  // of a rank, after a step
constexpr auto kSweep = std::chrono::milliseconds(30);
constexpr double kStuck = 10;          // after which a process that does not die is named
constexpr double kGivenUp = 60;        // and after which it is no longer waited for
constexpr int64_t kQuietRestarts = 1;  // without a new checkpoint: nobody needs to come
constexpr double kLastLook = 3;        // of pages, which ask every two seconds
constexpr double kFenceMargin = 1;
constexpr int kNoProgram = 126;  // and 127: mpirun cannot be started at all

// The rank that said so first; -1: none.
template <class Links>
int rank_with(const Links& links, Goodbye::Reason reason) {
  for (size_t rank = 0; rank < links.size(); ++rank)
    if (links[rank].goodbye && links[rank].goodbye->reason() == reason) return int(rank);
  return -1;
}

}  // namespace

// What the ranks have sent before may be read only now.
void Supervisor::job_ended() {
  if (doing_ == Doing::running) act_.set(kLastWords, [this] { judge(); });
}

// From the ranks' last words and mpirun's exit code: how the attempt ended.
void Supervisor::judge() {
  if (doing_ != Doing::running) return;
  using Kind = AttemptEnd::Kind;
  const auto said = [&](Goodbye::Reason reason) { return rank_with(links_, reason); };
  const auto text_of = [&](int rank) {
    return concat(name_of(view_.of_ranks[size_t(rank)]), ": ",
                  links_[size_t(rank)].goodbye->text());
  };
  const int code = job_.runs() ? -1 : job_.code().value_or(-1);
  const bool all_said = std::all_of(links_.begin(), links_.end(),
                                    [](const RankLink& link) { return link.goodbye.has_value(); });
  const bool any_came =
      std::any_of(view_.of_ranks.begin(), view_.of_ranks.end(),
                  [](const RankView& rank) { return rank.state != RankState::absent; });
  if (const int rank = said(Goodbye::SETTINGS); rank >= 0 || code == kExitSettings)
    return end_attempt({.kind = Kind::settings,
                        .rank = rank,
                        .event = "failed",
                        .text = rank >= 0 ? text_of(rank) : "wrong settings; which, see above"});
  if (const int rank = said(Goodbye::FINAL); rank >= 0)
    return end_attempt(
        {.kind = Kind::gave_up, .rank = rank, .event = "failed", .text = text_of(rank)});
  if (const int rank = said(Goodbye::FAILED); rank >= 0)
    return end_attempt(
        {.kind = Kind::failed, .rank = rank, .event = "failed", .text = text_of(rank)});
  if (code == 0 || (all_said && said(Goodbye::LOST) < 0 && said(Goodbye::FENCED) < 0)) {
    const bool stopped = said(Goodbye::STOPPED) >= 0;
    return end_attempt({.kind = stopped ? Kind::stopped : Kind::done,
                        .event = stopped ? "stopped" : "done",
                        .text = stopped ? "stopped as asked, with a checkpoint" : "done"});
  }
  for (const Goodbye::Reason reason : {Goodbye::LOST, Goodbye::FENCED})
    if (const int rank = said(reason); rank >= 0)
      return end_attempt({.kind = Kind::lost, .text = text_of(rank)});
  if (code == kNoProgram || code == kNoProgram + 1)
    return end_attempt({.kind = Kind::settings,
                        .event = "failed",
                        .text = "what starts the ranks cannot be run; why, see above"});
  const std::string how = code > 128 && code <= 128 + SIGRTMAX
                              ? concat("was ended by signal ", code - 128)
                          : code >= 0 ? concat("ended with exit code ", code)
                                      : std::string("is gone");
  const bool failed = code == 1 && any_came;
  end_attempt({.kind = failed                 ? Kind::failed
                       : any_came || adopted_ ? Kind::lost
                                              : Kind::not_begun,
               .event = failed ? "failed" : "lost",
               .text = concat(request_.srun_options.empty() ? "mpirun " : "srun ", how,
                              any_came   ? ""
                              : adopted_ ? " before its ranks had come back"
                                         : " before any rank came; why, see above")});
}

// What the kernel says of a process that does not answer.
std::string Supervisor::process_text(int rank) const {
  if (rank < 0 || !links_[size_t(rank)].local || links_[size_t(rank)].process_ended) return "";
  switch (process_state(view_.of_ranks[size_t(rank)].pid)) {
    case 'T':
      return "; its process is stopped (SIGSTOP)";
    case 't':
      return "; its process is held by a debugger";
    case 'D':
      return "; its process waits for a disk or a device";
    case 0:
    case 'Z':
    case 'X':
      return "; its process is dead";
    default:
      return "";
  }
}

// Only once for an attempt.
void Supervisor::end_attempt(Fault fault) {
  if (doing_ != Doing::running) return;
  doing_ = Doing::ending;
  act_.cancel();
  stop_.cancel();
  ended_at_ = now();
  fault_ = std::move(fault);
  if (fault_.kind == AttemptEnd::Kind::lost) fault_.text += process_text(fault_.rank);
  stack_.clear();
  using Kind = AttemptEnd::Kind;
  const bool well = fault_.kind == Kind::done || fault_.kind == Kind::stopped;
  if (!well) events_.say({.kind = fault_.event, .step = step_at_hand(), .text = fault_.text});
  if (!well && view_.state != RunState::stopping) view_.state = RunState::recovering;
  if (fault_.kind == Kind::lost)
    view_.hang_report = fault_.text + "\n" + table_of(view_, fault_.rank, now());
  if (fault_.asks_stack && fault_.rank >= 0 && server_->connected(fault_.rank)) {
    ControlWord word;
    word.mutable_order()->set_what(Order::SEND_STACK);
    server_->send(fault_.rank, word);
    act_.set(kStackWait, [this] { kill_all([this] { conclude(); }); });
    return;
  }
  kill_all([this] { conclude(); });
}

void Supervisor::got_stack(const std::vector<std::string>& frames) {
  if (doing_ != Doing::ending || !fault_.asks_stack || !stack_.empty()) return;
  stack_ = frames;
  kill_all([this] { conclude(); });
}

void Supervisor::kill_all(std::function<void()> gone) {
  if (replaced()) return;
  doing_ = Doing::ending;
  act_.cancel();
  gone_ = std::move(gone);
  ending_since_ = now();
  stuck_said_ = false;
  unreachable_.clear();
  stuck_.clear();
  server_->send_all(end_order());
  kill_round();
}

ControlWord Supervisor::end_order() const {
  ControlWord word;
  word.mutable_order()->set_what(Order::END);
  word.mutable_order()->set_text(fault_.text);
  return word;
}

// Again and again until nothing is there. What has had SIGKILL and does not die waits for a device:
// it never runs a line of its own again, so that others can go on beside it.
void Supervisor::kill_round() {
  const Swept swept =
      sweep_processes({.has = {concat(kRunKeyVariable, "=", run_key_)}, .lacks = {}}, kSweep);
  std::vector<FoundProcess> left;
  for (const FoundProcess& process : swept.left)
    if (given_up_.count({process.pid, process.started}) == 0) left.push_back(process);
  const bool job_runs = job_.runs() && given_up_.count({job_.pid(), job_.started()}) == 0;
  if (left.empty() && !job_runs && others_gone()) return std::exchange(gone_, nullptr)();
  const double waited = now() - ending_since_;
  if (signals_got_ > 0 && now() > give_up_at_)
    return finish(early_exit_code(), "stopped",
                  concat(early_text(), "; not proven gone: ",
                         left.empty() ? std::string("ranks elsewhere, which end themselves")
                                      : describe(left)),
                  /*gone=*/false);
  if (!left.empty() && waited > kGivenUp && others_gone()) {
    for (const FoundProcess& process : left) given_up_.emplace(process.pid, process.started);
    stuck_ = describe(left);
    return std::exchange(gone_, nullptr)();
  }
  if (!stuck_said_ && !left.empty() && waited > kStuck) {
    stuck_said_ = true;
    view_.trouble = "processes do not die: " + describe(left);
    events_.say({.kind = "stuck",
                 .text = concat("these do not die, even of SIGKILL (a disk or a GPU that does not "
                                "answer?): ",
                                describe(left), "; waiting for them for ", kGivenUp, " s")});
  }
  act_.set(kKillRound, [this] { kill_round(); });
}

// Ranks of other machines: their connections are closed, or they have had no word from here for so
// long that they have ended themselves.
bool Supervisor::others_gone() {
  if (now() < fenced_at_) return false;
  std::set<std::string> unreachable;
  for (size_t rank = 0; rank < links_.size(); ++rank) {
    const RankView& view = view_.of_ranks[rank];
    if (links_[rank].local || !server_->connected(int(rank))) continue;
    if (now() < view.heard + launch_.fence_seconds() + kFenceMargin) return false;
    unreachable.insert(listed_host(int(rank)));
  }
  unreachable_.assign(unreachable.begin(), unreachable.end());
  return true;
}

// The name under which the machine of a rank was given; a list may have addresses, or "localhost".
std::string Supervisor::listed_host(int rank) const {
  const RankView& view = view_.of_ranks[size_t(rank)];
  const RankLink& link = links_[size_t(rank)];
  for (const HostSlots& host : request_.hosts)
    if (same_host(host.name, view.host) || host.name == link.address ||
        (link.local && is_this_host(host.name)))
      return host.name;
  return view.host;
}

std::string Supervisor::listed_name_of_this_host() const {
  for (const HostSlots& host : request_.hosts)
    if (is_this_host(host.name)) return host.name;
  return this_host();
}

int64_t Supervisor::step_at_hand() const {
  int64_t step = std::max<int64_t>(0, view_.saved_step);
  for (const RankView& rank : view_.of_ranks) step = std::max(step, latest_of(rank).step);
  return step;
}

// A rank's heartbeats and reports may be so old when it dies.
int64_t Supervisor::steps_unheard() const {
  double step = 0;
  for (const RankView& rank : view_.of_ranks) step = std::max(step, rank.step_seconds);
  return step > 0 ? int64_t((launch_.heartbeat_seconds() + kReportDelay) / step) : 0;
}

// The table and the culprit's stack, whose functions are looked up only now that nothing waits.
void Supervisor::say_report() {
  if (!stack_.empty()) view_.hang_report += "  its stack:\n" + stack_text(stack_, kSymbols);
  outlet_.say(view_.hang_report.substr(view_.hang_report.find('\n') + 1));
}

// Machines of ranks that died, fell silent or told an error. An error that ranks of several
// machines tell is none of a machine.
std::vector<std::string> Supervisor::hosts_at_fault() const {
  std::set<std::string> hosts, failed;
  for (const RankView& rank : view_.of_ranks) {
    const auto& goodbye = links_[size_t(rank.rank)].goodbye;
    if (goodbye && (goodbye->reason() == Goodbye::FAILED || goodbye->reason() == Goodbye::SETTINGS))
      failed.insert(listed_host(rank.rank));
    else if (!rank.host.empty() &&  // else it never came, and where to is mpirun's business
             (rank.rank == fault_.rank || rank.state == RankState::silent))
      hosts.insert(listed_host(rank.rank));
  }
  if (failed.size() == 1) hosts.merge(failed);
  return {hosts.begin(), hosts.end()};
}

// Nothing is left of the attempt.
void Supervisor::conclude() {
  log_.follow(outlet_);
  leftovers_.remove();
  using Kind = AttemptEnd::Kind;
  look_at_checkpoints();
  if (fault_.kind != Kind::done && fault_.kind != Kind::stopped && is_finished())
    fault_ = {.kind = Kind::done, .event = "done", .text = "done"};
  AttemptEnd end{.kind = fault_.kind,
                 .step = step_at_hand(),
                 .steps_unheard = steps_unheard(),
                 .saved_step = view_.saved_step,
                 .trained = stepped_ || adopted_,
                 .hosts = hosts_at_fault(),
                 .unreachable = unreachable_,
                 .stuck_host = listed_name_of_this_host(),
                 .stuck = std::exchange(stuck_, {}),
                 .text = fault_.text};
  if (fault_.kind == Kind::lost) say_report();
  if (signals_got_ > 0 && fault_.kind != Kind::done)
    return finish(early_exit_code(), "stopped", early_text());
  const Verdict verdict = recovery_->after(end);
  if (verdict.restarts) return restart(verdict);
  finish(verdict.exit_code,
         verdict.crash_loop          ? "crash_loop"
         : verdict.exit_code == 0    ? "done"
         : end.kind == Kind::stopped ? "stopped"
                                     : "failed",
         verdict.text);
}

int Supervisor::early_exit_code() const {
  return last_signal_ == SIGINT ? 128 + SIGINT : kExitRestart;
}

std::string Supervisor::early_text() const {
  return concat("ended early, as ", signals_got_ > 1 ? "signals" : "a signal",
                " asked; the same command goes on from ", place_to_go_on());
}

std::string Supervisor::place_to_go_on() const {
  return view_.saved_step < 0 ? "the start" : concat("the checkpoint of step ", view_.saved_step);
}

void Supervisor::restart(const Verdict& verdict) {
  view_.restarts = int(recovery_->memory().restarts);
  for (const std::string& host : verdict.left_out_now)
    events_.say(
        {.kind = "host_left_out",
         .text = concat(host, " is left out from now on; ", recovery_->ranks(), " ranks go on")});
  for (const std::string& host : verdict.away_now)
    events_.say(
        {.kind = "host_left_out",
         .text = concat(host, " is left out of the next attempt, for it does not seem to answer; ",
                        recovery_->ranks(), " ranks go on. The restart after that tries ",
                        "it again")});
  view_.state_text =
      concat("restart ", view_.restarts, ": ", recovery_->ranks(),
             recovery_->ranks() == 1 ? " rank" : " ranks", " from ", place_to_go_on(),
             verdict.pause > 0 ? concat(" in ", verdict.pause, " s") : "");
  const RecoveryMemory& memory = recovery_->memory();
  const int64_t in_vain = memory.without_progress + memory.in_vain;
  view_.trouble = in_vain > kQuietRestarts
                      ? concat("recovering: ", in_vain,
                               " restarts without a new checkpoint; the latest: ", verdict.text)
                      : "";
  events_.say({.kind = "restarting", .step = view_.saved_step, .text = view_.state_text});
  doing_ = Doing::pausing;
  remember(true);
  act_.set(verdict.pause, [this] { begin_attempt(); });
}

// What is not proven gone is remembered as running: who comes next waits until it must have ended.
void Supervisor::finish(int exit_code, const std::string& kind, const std::string& text,
                        bool gone) {
  doing_ = Doing::over;
  exit_code_ = exit_code;
  view_.state = exit_code == 0      ? RunState::done
                : kind == "stopped" ? RunState::stopped
                                    : RunState::failed;
  view_.state_text = text;
  events_.say({.kind = kind, .text = text});
  remember(!gone);
  if (status_) files_.remove(join_path(folder_, "status_url"));
  // So that pages and probes learn of it.
  const bool is_news = view_.state == RunState::failed || view_.state == RunState::done;
  if (!status_ || !is_news || (view_.state == RunState::done && !status_->asked_lately()))
    return context_.stop();
  view_.trouble.clear();
  outlet_.pump();
  act_.set(kLastLook, [this] { context_.stop(); });
}

}  // namespace moemamba
