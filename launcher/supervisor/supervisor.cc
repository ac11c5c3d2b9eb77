#include "launcher/supervisor/supervisor.h"

#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>

#include "core/digest.h"
#include "core/error.h"
#include "launcher/launch.h"
#include "launcher/process_sweep.h"
#include "launcher/stop_signals.h"
#include "launcher/supervisor/hosts.h"
#include "runtime/checkpoint_folder.h"
#include "runtime/checkpoint_reader.h"
#include "runtime/control_wire.h"
#include "runtime/process_facts.h"
#include "runtime/run_folder.h"
#include "runtime/weights.h"

namespace moemamba {

namespace {

constexpr double kTick = 0.1;
constexpr double kBeforeTheEnd = 5;  // seconds of the grace that are left to others
constexpr double kSecondSignal = 1;  // for what it kills to be gone
constexpr double kStopFallback = 1;  // without any answer from a rank
constexpr double kSaveMargin = 1.5;  // the last one writes the weights too
constexpr int64_t kLogsKept = 10;    // of the latest attempts

// While it is there, the run that is to be overwritten is there too: it goes with that run's files.
std::string overwriting_mark(const std::string& run) {
  return join_path(run, "overwriting");
}

// A descriptor for each rank's connection and its process, and for all else.
void allow_connections(int ranks) {
  rlimit limit{};
  const rlim_t wanted = 2 * rlim_t(ranks) + 500;
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= wanted) return;
  limit.rlim_cur = std::min(wanted, limit.rlim_max);
  setrlimit(RLIMIT_NOFILE, &limit);
}

WatchLimits limits_of(const LaunchConfig& launch) {
  return {.lost = launch.lost_seconds(),
          .hang = launch.hang_seconds(),
          .start = launch.start_seconds(),
          .save = launch.save_seconds(),
          .evaluation = launch.evaluation_seconds(),
          .straggler_share = launch.straggler_share()};
}

}  // namespace

Supervisor::Supervisor(LaunchRequest request)
    : request_(std::move(request)),
      launch_(request_.config.launch()),
      run_(std::filesystem::absolute(request_.config.run()).lexically_normal().string()),
      folder_(join_path(run_, "supervisor")),
      events_(run_, view_, outlet_, [this] { return file_exists(overwriting_mark(run_)); }) {}

Supervisor::~Supervisor() = default;

double Supervisor::now() const {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
}

int Supervisor::run() {
  signal(SIGPIPE, SIG_IGN);  // a terminal that is gone must not end the run
  allow_connections(request_.ranks);
  open();
  tick();
  context_.run();
  log_.follow(outlet_);
  outlet_.finish(1);
  return exit_code_;
}

// Takes the run, and goes on with whatever is there of it.
void Supervisor::open() {
  holds_run(run_);  // an Error where the folder holds other things
  if (!launch_.status_address().empty()) status_options(launch_, run_);  // or where they are wrong
  const std::string address = control_address(launch_.control_address(), request_.hosts);
  check_control_address(address);
  // Whoever is silent for so long has lost its ranks too: they have ended themselves.
  const double lifetime =
      std::max(request_.config.checkpoint().lease_seconds(), launch_.fence_seconds() + 1);
  lease_ = std::make_unique<Lease>(
      files_, run_, Lease::Options{.lifetime = std::chrono::milliseconds(int64_t(lifetime * 1e3))});
  wait_for_signals();  // until here they end the process, and nothing was begun
  const std::string secret = make_secret(files_, folder_);
  run_key_ = sha256("run key\n" + secret).substr(0, 32);
  server_ = std::make_unique<ControlServer>(
      context_,
      ControlServer::Options{.address = address,
                             .secret = secret,
                             .fence_seconds = launch_.fence_seconds(),
                             .heartbeat_seconds = launch_.heartbeat_seconds()},
      ControlServer::Events{
          .joined = [this](const Hello& hello, const std::string& from) { joined(hello, from); },
          .said = [this](int rank, const ControlWord& word) { said(rank, word); },
          .closed = [this](int rank) { closed(rank); },
          .refused = [this](const std::string&) { ++view_.refused_connections; }});
  write_file(files_, join_path(folder_, "address"), server_->address() + "\n");

  const RunConfig& config = request_.config;
  view_.run = run_;
  view_.steps = config.train().steps();
  view_.global_batch = config.train().global_batch_size();
  view_.sequence_length = config.train().sequence_length();
  look_at_checkpoints();
  const std::optional<JobState> before = read_job_state(folder_);
  if (before) state_.attempt = before->attempt;
  const bool same = before && before->running && before->command == command_words();
  recovery_ = std::make_unique<Recovery>(Recovery::Options{.limits = launch_,
                                                           .ranks = request_.ranks,
                                                           .expert = config.parallel().expert(),
                                                           .hosts = request_.hosts,
                                                           .here = listed_name_of_this_host()},
                                         same ? before->memory : RecoveryMemory{});
  if (!file_exists(overwriting_mark(run_))) events_.recall();
  if (before && before->running && go_on_with(*before)) return open_status(/*needed=*/false);
  open_status(/*needed=*/true);
  check(!request_.fresh || !holds_run(run_), taken_text(run_, "--fresh wants an empty folder"));
  mark_overwriting(before);
  look_at_checkpoints();
  if (is_finished()) {
    context_.post([this] {
      finish(0, "done",
             concat(run_, ": the run is finished: step ", view_.steps, " of ", view_.steps,
                    "; with more train.steps it goes on"));
    });
    return;
  }
  const bool elsewhere =
      std::any_of(request_.hosts.begin(), request_.hosts.end(),
                  [](const HostSlots& host) { return !is_this_host(host.name); });
  if (before && before->running && elsewhere) fenced_at_ = launch_.fence_seconds() + 1;
  kill_all([this] { begin_attempt(); });  // what an earlier supervisor may have left
}

// Not needed: by a job that runs. Where its port is taken another one will do, and it goes on
// without any page rather than not at all.
void Supervisor::open_status(bool needed) {
  const std::string file = join_path(folder_, "status_url");
  files_.remove(file);
  if (launch_.status_address().empty()) return;
  StatusOptions options = status_options(launch_, run_);
  for (const int port : {options.port, 0}) {
    options.port = port;
    try {
      status_ = std::make_unique<StatusServer>(context_, options, view_, [this] { return now(); });
      break;
    } catch (const Error& error) {
      if (needed) throw;
      outlet_.say(concat("moemamba: ", error.what()));
    }
  }
  if (!status_) return outlet_.say("moemamba: the job goes on, and there is no page of it");
  try {
    write_file(files_, file, status_->url() + "\n");
  } catch (const Error& error) {
    if (needed) throw;
    outlet_.say(concat("moemamba: ", error.what()));
  }
  outlet_.say("moemamba: the run can be watched at " + status_->url());
}

std::vector<std::string> Supervisor::command_words() const {
  std::vector<std::string> words = request_.words;
  words.push_back(concat(request_.ranks));
  return words;
}

// The mark of a run that is to be overwritten. A command that has overwritten already, and is
// started again because it was to go on, or its supervisor died, goes on.
void Supervisor::mark_overwriting(const std::optional<JobState>& before) {
  const std::string mark = overwriting_mark(run_);
  const bool goes_on =
      before && before->command == command_words() && (before->running || before->resumes);
  if (!request_.config.overwrite()) {
    files_.remove(mark);  // of a launch that never came to it
  } else if (!holds_run(run_) || file_exists(mark)) {
    return;
  } else if (goes_on) {
    outlet_.say(concat(
        "moemamba: ", run_,
        ": this very command has begun the run; going on with it, not overwriting it again"));
  } else {
    write_file(files_, mark, "");
    view_.events.clear();
  }
}

// The job of a supervisor that died. True: it lives, and is this one's from now on.
bool Supervisor::go_on_with(const JobState& before) {
  state_.steps_lost = view_.steps_lost = before.steps_lost;
  view_.restarts = int(before.memory.restarts);
  const bool here = before.host == this_host() && before.boot_id == boot_id();
  if (!here || before.command != command_words() ||
      !job_.adopt(before.pid, before.started, [this] { job_ended(); }))
    return false;
  state_ = before;
  reset_view(before.ranks, before.expert);
  view_.job = before.job;
  adopted_ = true;
  watch_->go_on(double(before.step_limit_ms) / 1e3);
  server_->expect(before.job, before.ranks, lease_->generation());
  leftovers_.learn_from_launcher(before.pid);
  log_.open(join_path(folder_, concat("ranks-", before.attempt, ".log")), /*from_end=*/true);
  doing_ = Doing::running;
  remember(true);
  events_.say({.kind = "taken_over",
               .text = concat("took over the running job of a supervisor that died: attempt ",
                              before.attempt, ", ", before.ranks, " ranks, process ", before.pid)});
  // They come back within a third of a second.
  act_.set(launch_.lost_seconds(), [this] {
    for (const RankView& rank : view_.of_ranks)
      if (rank.state == RankState::absent)
        return end_attempt({.rank = rank.rank,
                            .text = concat("rank ", rank.rank,
                                           " did not come back to the supervisor that took over")});
  });
  return true;
}

// Those of a run that is to be overwritten say nothing of the one that takes its place.
// What cannot be read leaves the last known: the ranks will say what is wrong with it.
void Supervisor::look_at_checkpoints() {
  if (file_exists(overwriting_mark(run_))) {
    view_.saved_step = -1;
    return view_.run_id.clear();
  }
  try {
    const auto checkpoints = list_checkpoints(run_);
    view_.saved_step = checkpoints.empty() ? -1 : checkpoints.front().step;
    if (checkpoints.empty() || !view_.run_id.empty()) return;
    view_.run_id = Checkpoint(checkpoints.front().path).manifest().facts().run_id();
  } catch (const std::exception&) {
  }
}

// As the ranks would find: they refuse to begin a run that is done. What cannot be read is none.
bool Supervisor::is_finished() const {
  try {
    return says_finished();
  } catch (const std::exception&) {
    return false;  // the next attempt writes or names it
  }
}

bool Supervisor::says_finished() const {
  const int64_t steps = request_.config.train().steps();
  const std::string weights = join_path(run_, "weights");
  if (file_exists(overwriting_mark(run_)) || !holds_run(run_) || !file_exists(weights))
    return false;
  const auto checkpoints = list_checkpoints(run_);
  const int64_t newest = checkpoints.empty() ? 0 : checkpoints.front().step;
  if (newest < steps) return false;
  const WeightsMetadata metadata = read_weights_metadata(weights);
  const auto step = metadata.find("step");
  return step != metadata.end() && step->second == concat(newest);
}

void Supervisor::reset_view(int ranks, int expert) {
  view_.ranks = ranks;
  view_.expert_ranks = expert;
  view_.started = now();
  view_.state = RunState::starting;
  view_.of_ranks.assign(size_t(ranks), {});
  for (int rank = 0; rank < ranks; ++rank) view_.of_ranks[size_t(rank)].rank = rank;
  view_.hosts_left_out = recovery_->left_out();
  links_.clear();
  links_.resize(size_t(ranks));
  watch_ = std::make_unique<Watch>(limits_of(launch_), ranks);
  stepped_ = adopted_ = false;
}

std::vector<std::string> Supervisor::command_of_attempt() {
  setenv(kSupervisorVariable, folder_.c_str(), 1);
  setenv(kJobVariable, state_.job.c_str(), 1);
  setenv(kRunKeyVariable, run_key_.c_str(), 1);
  RanksCommand command{
      .ranks = recovery_->ranks(),
      .options = {launch_.mpirun_options().begin(), launch_.mpirun_options().end()},
      .names = {kSupervisorVariable, kJobVariable, kRunKeyVariable},
      .words = request_.words};
  if (recovery_->expert() != request_.config.parallel().expert())
    command.words.push_back(concat("--parallel.expert=", recovery_->expert()));
  if (request_.config.overwrite() && !file_exists(overwriting_mark(run_)))
    command.words.push_back("--overwrite=false");  // done
  const std::vector<HostSlots> hosts = recovery_->hosts();
  if (!request_.srun_options.empty()) {
    command.hosts_left_out = recovery_->left_out();
    if (!command.hosts_left_out.empty()) command.hosts = int(hosts.size());
    command.options.insert(command.options.begin(), request_.srun_options.begin(),
                           request_.srun_options.end());
    return srun_words(command);
  }
  if (!hosts.empty()) {
    command.hostfile = join_path(folder_, "hosts");
    write_file(files_, command.hostfile, hostfile_text(hosts));
  }
  command.this_machine_alone = std::all_of(
      hosts.begin(), hosts.end(), [](const HostSlots& host) { return is_this_host(host.name); });
  command.fence_seconds = launch_.fence_seconds();
  return mpirun_words(command);
}

void Supervisor::begin_attempt() {
  if (signals_got_ > 0) return finish(early_exit_code(), "stopped", early_text());
  if (!stuck_.empty())  // and belongs to a supervisor before this one
    return finish(kExitRestart, "failed",
                  concat("these do not die, even of SIGKILL: ", std::exchange(stuck_, {}),
                         "; the same command goes on once they are gone"));
  try {
    start_ranks();
  } catch (const std::exception& error) {  // a full disk, no more processes: it may pass
    end_attempt({.kind = AttemptEnd::Kind::not_begun, .event = "failed", .text = error.what()});
  }
}

// Under a lease of its own, so that nothing that is left of the attempt before can write.
void Supervisor::start_ranks() {
  doing_ = Doing::running;
  state_.attempt += 1;
  state_.job = hex_of_bytes(random_bytes(16));
  const std::string log = join_path(folder_, concat("ranks-", state_.attempt, ".log"));
  files_.remove(join_path(folder_, concat("ranks-", state_.attempt - kLogsKept, ".log")));
  reset_view(recovery_->ranks(), recovery_->expert());
  view_.job = state_.job;
  view_.state_text = concat("starting ", view_.ranks, view_.ranks == 1 ? " rank" : " ranks");
  lease_->advance();
  server_->expect(state_.job, view_.ranks, lease_->generation());
  const std::vector<std::string> command = command_of_attempt();
  job_.start(command, log, [this] { job_ended(); });
  log_.open(log, /*from_end=*/false);
  leftovers_.learn_from_launcher(job_.pid());
  remember(true);
}

void Supervisor::remember(bool running) {
  state_.running = running;
  // As a signal asked; the words at its end promise so.
  state_.resumes =
      doing_ == Doing::over && (exit_code_ == kExitRestart || exit_code_ == 128 + SIGINT);
  state_.host = this_host();
  state_.boot_id = boot_id();
  state_.pid = job_.pid();
  state_.started = job_.started();
  state_.ranks = view_.ranks;
  state_.expert = view_.expert_ranks;
  state_.steps_lost = view_.steps_lost;
  state_.step_limit_ms = watch_ ? int64_t(watch_->step_limit() * 1e3) : 0;
  state_.memory = recovery_->memory();
  state_.command = command_words();
  try {
    write_job_state(files_, folder_, state_);
  } catch (const Error& error) {  // a full disk: a successor could not take over, that is all
    events_.say({.kind = "state_not_written", .text = error.what()});
  }
}

// Another supervisor holds the run, since this one was away for too long: what runs is that one's.
bool Supervisor::replaced() {
  if (doing_ == Doing::over || !lease_->replaced()) return doing_ == Doing::over;
  doing_ = Doing::over;
  outlet_.say(concat("moemamba: ", run_, ": another supervisor has taken over; this one ends"));
  context_.stop();
  return true;
}

void Supervisor::tick() {
  constexpr int kLeaseTicks = 10;
  if (++ticks_made_ % kLeaseTicks == 1 && replaced()) return;
  log_.follow(outlet_);
  outlet_.pump();
  events_.flush();
  if (doing_ == Doing::running) {
    if (const auto trouble = watch_->look(view_, now())) {
      const bool hangs = trouble->kind == Trouble::Kind::hang;
      const bool came = trouble->rank < 0 || adopted_ ||
                        view_.of_ranks[size_t(trouble->rank)].state != RankState::absent;
      end_attempt({.kind = came ? AttemptEnd::Kind::lost : AttemptEnd::Kind::not_begun,
                   .rank = trouble->rank,
                   .event = hangs ? "hang" : "lost",
                   .text = trouble->text,
                   .asks_stack = hangs});
    }
  }
  if (doing_ != Doing::over) ticks_.set(kTick, [this] { tick(); });
}

void Supervisor::wait_for_signals() {
  const sigset_t wanted = stop_signals();
  for (int signal : {SIGINT, SIGTERM, SIGUSR1})
    if (sigismember(&wanted, signal)) signals_.add(signal);
  struct sigaction hang_up {};  // of the terminal; nohup ignores it
  if (sigaction(SIGHUP, nullptr, &hang_up) == 0 && hang_up.sa_handler != SIG_IGN)
    signals_.add(SIGHUP);
  next_signal();
}

void Supervisor::next_signal() {
  signals_.async_wait([this](const boost::system::error_code& error, int signal) {
    if (error) return;
    stop_asked(signal);
    next_signal();
  });
}

// The first signal asks for a save and an end within the grace; the next one ends all at once.
void Supervisor::stop_asked(int signal) {
  if (doing_ == Doing::over) return context_.stop();
  const bool same_word = signals_got_ > 0 && signal != SIGINT &&
                         now() < first_signal_at_ + double(kRepeatedSignals.count());
  if (same_word) return;
  last_signal_ = signal;
  if (++signals_got_ > 1) {
    give_up_at_ = std::min(give_up_at_, now() + kSecondSignal);
    if (doing_ == Doing::running) end_early(concat(signal_name(signal), ": ended at once"));
    return;
  }
  first_signal_ = signal;
  first_signal_at_ = now();
  give_up_at_ = now() + std::max(kSecondSignal, launch_.grace_seconds() - kBeforeTheEnd / 2);
  const double left = std::max(0.0, launch_.grace_seconds() - kBeforeTheEnd);
  const double needed = seconds_to_save();
  const bool has_something = adopted_ || std::any_of(view_.of_ranks.begin(), view_.of_ranks.end(),
                                                     [](const RankView& r) { return r.step >= 0; });
  const bool saves = doing_ == Doing::running && has_something && needed <= left;
  std::string text = concat(signal_name(signal), ": ending");
  if (saves)
    text = concat(signal_name(signal), ": saving and ending, within ", left,
                  " s; the next signal ends it at once");
  else if (needed > left)
    text = concat(signal_name(signal), ": two steps and a save take ", needed,
                  " s, which does not fit in ", left,
                  " s (launch.grace_seconds): ending with the checkpoint that is there");
  events_.say({.kind = "preempted", .text = text});
  view_.state = RunState::stopping;
  view_.state_text = text;
  if (doing_ == Doing::pausing) return finish(early_exit_code(), "stopped", early_text());
  if (doing_ != Doing::running) return;  // on its way
  if (!saves) return end_early(text);
  stop_deadline_ = now() + left;
  order_stop();
}

// From a signal to a checkpoint that is there, after what steps and saves have taken so far.
double Supervisor::seconds_to_save() const {
  double step = 0;
  for (const RankView& rank : view_.of_ranks) step = std::max(step, rank.step_seconds);
  // Ranks agree in a step to end with it: a word that comes amid one is for the next.
  return 2 * step + kSaveMargin * view_.save_seconds;
}

void Supervisor::end_early(const std::string& text) {
  end_attempt({.kind = AttemptEnd::Kind::stopped, .event = "stopped", .text = text});
}

void Supervisor::order_stop() {
  ControlWord word;
  word.mutable_order()->set_what(Order::STOP);
  word.mutable_order()->set_text(signal_name(first_signal_));
  server_->send_all(word);
  stop_.set(kStopFallback, [this] {
    const bool answered =
        std::any_of(view_.of_ranks.begin(), view_.of_ranks.end(), [this](const RankView& rank) {
          return server_->connected(rank.rank) || links_[size_t(rank.rank)].goodbye;
        });
    if (doing_ == Doing::running && !answered) job_.signal(SIGUSR1);
    stop_.set(std::max(0.0, stop_deadline_ - now()), [this] {
      if (doing_ == Doing::running)
        end_early("the grace is over before the save: ended with the checkpoint before");
    });
  });
}

}  // namespace moemamba
