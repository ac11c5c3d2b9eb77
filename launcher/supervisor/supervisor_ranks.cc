// What the ranks say, and what becomes of it in the view.
#include <algorithm>

#include "core/error.h"
#include "launcher/supervisor/hosts.h"
#include "launcher/supervisor/supervisor.h"
#include "runtime/process_facts.h"

namespace moemamba {

namespace {

constexpr double kReconnect = 0.5;    // seconds in which a rank comes back whose connection broke
constexpr double kFresh = 1.8;        // quiet before it broke; agents leave a silent one after 2
constexpr double kLastWords = 0.2;    // between a process's end and the last that it has sent
constexpr double kPatience = 2;       // from a rank's goodbye to its end, for what it still prints
constexpr double kOthersTurn = 1;     // from "others are lost" to who that is
constexpr double kLauncherEnds = 20;  // from the last goodbye to mpirun's end

}  // namespace

void Supervisor::joined(const Hello& hello, const std::string& address) {
  const int rank = hello.rank();
  RankView& view = view_.of_ranks[size_t(rank)];
  RankLink& link = links_[size_t(rank)];
  const bool first = view.state == RankState::absent;
  view.host = hello.host();
  view.gpu = hello.gpu();
  view.pid = hello.pid();
  view.state = RankState::alive;
  view.heard = now();
  if (first) view.progressed = now();
  link.address = address;
  link.closed = false;
  link.patience.reset();
  link.local = hello.host() == this_host() && hello.boot_id() == boot_id() &&
               process_start(hello.pid()) == hello.pid_started();
  if (link.local && !link.end) {
    leftovers_.learn_from_rank(pid_t(hello.pid()));
    link.end = std::make_unique<ProcessEnd>(context_, pid_t(hello.pid()), hello.pid_started(),
                                            [this, rank] { process_ended(rank); });
  }
  if (signals_got_ > 0 && doing_ == Doing::running) order_stop();
  if (doing_ == Doing::ending && gone_) server_->send(rank, end_order());  // it was cut off before
  const bool all_here =
      std::none_of(view_.of_ranks.begin(), view_.of_ranks.end(),
                   [](const RankView& r) { return r.state == RankState::absent; });
  if (!first || !all_here || doing_ != Doing::running) return;
  std::vector<std::string> hosts;
  for (const RankView& r : view_.of_ranks)
    if (std::find(hosts.begin(), hosts.end(), r.host) == hosts.end()) hosts.push_back(r.host);
  std::string names;
  for (const std::string& host : hosts) names += (names.empty() ? "" : ", ") + host;
  events_.note({.kind = "started",
                .text = concat("attempt ", state_.attempt, ": ", view_.ranks, " ranks on ", names,
                               ", ", now() - view_.started, " s after their start")});
}

void Supervisor::said(int rank, const ControlWord& word) {
  view_.of_ranks[size_t(rank)].heard = now();
  if (word.has_heartbeat()) heard(rank, word.heartbeat());
  if (word.has_step()) stepped(rank, word.step());
  if (word.has_event()) event(word.event());
  if (word.has_goodbye()) goodbye(rank, word.goodbye());
  if (word.has_stack() && rank == fault_.rank)
    got_stack({word.stack().frames().begin(), word.stack().frames().end()});
  if (word.has_experts()) {
    const ExpertLoad& load = word.experts();
    const bool whole = load.layers() >= 0 && load.experts() >= 0 &&
                       int64_t(load.layers()) * load.experts() == load.choices_size();
    if (whole)
      view_.experts = {.step = load.step(),
                       .dropped_rows = load.dropped_rows(),
                       .layers = load.layers(),
                       .experts = load.experts(),
                       .choices = {load.choices().begin(), load.choices().end()}};
  }
}

void Supervisor::heard(int rank, const Heartbeat& beat) {
  RankView& view = view_.of_ranks[size_t(rank)];
  if (beat.progress() != view.activity.progress) view.progressed = now();
  view.activity = {.phase = Phase(beat.phase()),
                   .step = beat.step(),
                   .layer = beat.layer(),
                   .collective = beat.collective(),
                   .in_collective = beat.in_collective(),
                   .rows_expected = beat.rows_expected(),
                   .rows_received = beat.rows_received(),
                   .progress = beat.progress()};
  view.group = beat.group();
  view.reported = false;
  view.resident_bytes = beat.resident_bytes();
  view.gpu_bytes = beat.gpu_bytes();
  if (view.state == RankState::silent) view.state = RankState::alive;
}

void Supervisor::stepped(int rank, const StepReport& report) {
  RankView& view = view_.of_ranks[size_t(rank)];
  view.step = report.step();
  view.reported = true;
  view.progressed = now();
  view.step_seconds = report.seconds();
  view.busy_seconds = report.busy_seconds();
  view.exchange_seconds = report.exchange_seconds();
  if (!stepped_ && doing_ == Doing::running) {  // the first one since the start
    stepped_ = true;
    if (last_step_ >= report.step()) {
      view_.steps_lost += last_step_ + 1 - report.step();
      remember(true);
    }
    if (view_.state == RunState::starting) view_.state = RunState::training;
    view_.state_text = "training";
    const double took = now() - (ended_at_ > 0 ? ended_at_ : view_.started);
    events_.note(
        {.kind = "training",
         .step = report.step(),
         .text = concat("attempt ", state_.attempt, ": its first step has ended, ", took,
                        " s after ", ended_at_ > 0 ? "the end of the one before" : "its start"),
         .seconds = took});
  }
  last_step_ = std::max(last_step_, int64_t(report.step()));
  if (rank == 0) {
    view_.failed_saves = report.failed_saves();
    view_.skipped_steps = report.skipped_steps();
  }
  for (const auto& [slow, text] : watch_->stepped(view_, rank, report.step(), report.tokens()))
    events_.say({.kind = "straggler", .step = report.step(), .text = text});
  // A supervisor that takes the job over hears of no step before the next one has ended.
  const auto limit_ms = int64_t(watch_->step_limit() * 1e3);
  if (doing_ == Doing::running &&
      (limit_ms > 2 * state_.step_limit_ms || 2 * limit_ms < state_.step_limit_ms))
    remember(true);
}

void Supervisor::event(const RunEvent& event) {
  if (event.kind() == "saved") {
    view_.saved_step = event.step();
    view_.trouble.clear();
    if (event.has_seconds()) view_.save_seconds = event.seconds();
    if (view_.run_id.empty()) look_at_checkpoints();
  }
  events_.note({.kind = event.kind(),
                .step = event.has_step() ? event.step() : -1,
                .text = event.text(),
                .seconds = event.has_seconds() ? event.seconds() : -1});
}

// Where the process is in sight its end counts, and silence. Elsewhere a connection that breaks
// under a rank that was just heard of says that the process is dead, once it has not come back; one
// that was silent before may be cut off, and has its whole time.
void Supervisor::closed(int rank) {
  RankLink& link = links_[size_t(rank)];
  link.closed = true;
  if (link.process_ended) return gone(rank);
  if (link.local) return;
  const double silent = now() - view_.of_ranks[size_t(rank)].heard;
  const bool fresh = silent < std::max(kFresh, 2 * launch_.heartbeat_seconds());
  link.patience = std::make_unique<Alarm>(context_);
  link.patience->set(fresh ? kReconnect : std::max(kReconnect, launch_.lost_seconds() - silent),
                     [this, rank] { gone(rank); });
}

// What it sent last may still lie in its connection.
void Supervisor::process_ended(int rank) {
  RankLink& link = links_[size_t(rank)];
  link.process_ended = true;
  if (!server_->connected(rank)) return gone(rank);
  link.patience = std::make_unique<Alarm>(context_);
  link.patience->set(kLastWords, [this, rank] { gone(rank); });
}

// It is dead, or cut off.
void Supervisor::gone(int rank) {
  RankView& view = view_.of_ranks[size_t(rank)];
  const RankLink& link = links_[size_t(rank)];
  const bool was_there = view.state != RankState::ended;
  view.state = RankState::ended;
  if (doing_ != Doing::running || !was_there) {
    if (doing_ == Doing::running && link.goodbye &&
        (link.goodbye->reason() == Goodbye::FAILED || link.goodbye->reason() == Goodbye::FINAL ||
         link.goodbye->reason() == Goodbye::SETTINGS))
      judge();
    return;
  }
  end_attempt({.rank = rank,
               .text = concat(name_of(view), link.local ? " has died" : " is gone", "; it was at ",
                              activity_text(view))});
}

void Supervisor::goodbye(int rank, const Goodbye& word) {
  RankLink& link = links_[size_t(rank)];
  if (link.goodbye) return;
  link.goodbye = word;
  view_.of_ranks[size_t(rank)].state = RankState::ended;
  if (doing_ != Doing::running) return;
  double patience = -1;
  switch (word.reason()) {
    case Goodbye::DONE:
    case Goodbye::STOPPED:
      if (std::all_of(links_.begin(), links_.end(),
                      [](const RankLink& other) { return other.goodbye.has_value(); }))
        patience = kLauncherEnds;
      break;
    case Goodbye::FAILED:
    case Goodbye::FINAL:
    case Goodbye::SETTINGS:
      patience = kPatience;
      break;
    case Goodbye::LOST:
    case Goodbye::FENCED:
      patience = kOthersTurn;
      break;
  }
  if (patience >= 0) act_.set(patience, [this] { judge(); });
}

}  // namespace moemamba
