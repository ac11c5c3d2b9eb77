#include "launcher/supervisor/recovery.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <utility>

#include "core/error.h"
#include "launcher/launch.h"
#include "runtime/json_reader.h"
#include "runtime/json_text.h"

namespace moemamba {

namespace {

constexpr double kLongestPause = 60;
constexpr double kShortestPause = 1;  // before an attempt that may end as the one before
constexpr int kExitFailed = 1;
constexpr int64_t kBeforeSteps = -1;  // the "step" of attempts whose ranks never came

bool contains(const std::vector<std::string>& list, const std::string& name) {
  return std::find(list.begin(), list.end(), name) != list.end();
}

}  // namespace

Recovery::Recovery(Options options, RecoveryMemory memory)
    : options_(std::move(options)), memory_(std::move(memory)) {
  forget_hosts_that_are_not_listed();
  layout_ = layout_without(left_out());
}

// The memory may be of a launch with another list of hosts. Where too few of them would be left, it
// is of no use.
void Recovery::forget_hosts_that_are_not_listed() {
  const auto is_listed = [this](const std::string& name) {
    return std::ranges::any_of(options_.hosts,
                               [&](const HostSlots& host) { return host.name == name; });
  };
  for (auto* names :
       {&memory_.left_out, &memory_.away, &memory_.back, &memory_.suspects, &memory_.cleared})
    std::erase_if(*names, [&](const std::string& name) { return !is_listed(name); });
  if (layout_without(left_out()).ranks < least_ranks()) {
    memory_.left_out.clear();
    memory_.away.clear();
  }
}

std::vector<std::string> Recovery::left_out() const {
  std::vector<std::string> names = memory_.left_out;
  names.insert(names.end(), memory_.away.begin(), memory_.away.end());
  return names;
}

int Recovery::least_ranks() const {
  return options_.limits.min_ranks() > 0 ? options_.limits.min_ranks() : options_.ranks;
}

std::vector<HostSlots> Recovery::hosts() const {
  std::vector<HostSlots> hosts;
  for (const HostSlots& host : options_.hosts)
    if (!contains(left_out(), host.name)) hosts.push_back(host);
  return hosts;
}

Recovery::Layout Recovery::layout_without(const std::vector<std::string>& left_out) const {
  if (left_out.empty()) return {options_.ranks, options_.expert};
  int slots = 0;
  for (const HostSlots& host : options_.hosts)
    if (!contains(left_out, host.name)) slots += host.slots;
  const int most = std::min(slots, options_.ranks);
  if (most < 1) return {};
  int expert = options_.expert;
  while (expert > most || options_.expert % expert != 0) --expert;
  return {most / expert * expert, expert};
}

bool Recovery::may_go_without(const std::string& host) const {
  std::vector<std::string> without = left_out();
  without.push_back(host);
  return layout_without(without).ranks >= least_ranks();
}

// False: the run cannot go on without it.
bool Recovery::leave_out(const std::string& host, Verdict& verdict) {
  if (contains(memory_.left_out, host)) return true;
  if (!may_go_without(host)) return false;
  memory_.left_out.push_back(host);
  verdict.left_out_now.push_back(host);
  return true;
}

// Whom to blame for an attempt that did not begin: the hosts that it tried again, and those of the
// ranks that died last: a machine that goes down takes its connections with it and is not seen to
// be silent. Where there is nobody left to blame each has its turn, for mpirun does not say which
// of them it could not reach. Not this machine: here it runs.
std::vector<std::string> Recovery::suspects() {
  std::vector<std::string> names;
  const auto may_be = [&](const std::string& name) {
    return name != options_.here && !contains(memory_.cleared, name) &&
           !contains(memory_.left_out, name);
  };
  for (const auto* list : {&memory_.back, &memory_.suspects})
    for (const std::string& name : *list)
      if (may_be(name) && !contains(names, name)) names.push_back(name);
  if (!names.empty() || !memory_.trained || memory_.in_vain == 0) return names;
  for (const HostSlots& host : options_.hosts)
    if (may_be(host.name)) return {host.name};
  memory_.cleared.clear();  // it was none of them, or several; from the first again
  return {};
}

// Of the next attempt. Where the one without a host does not begin either it was not that host.
void Recovery::choose_hosts(const AttemptEnd& end, Verdict& verdict) {
  std::set<std::string> silent(end.unreachable.begin(), end.unreachable.end());
  std::set<std::string> doubtful;
  if (end.kind == AttemptEnd::Kind::not_begun) {
    for (const std::string& host : memory_.away) {
      memory_.failures.erase(host);
      memory_.cleared.push_back(host);
    }
    for (const std::string& host : suspects())
      if (!contains(memory_.back, host))
        doubtful.insert(host);
      else
        silent.insert(host);
    memory_.suspects.clear();
  } else {
    memory_.cleared.clear();
    memory_.suspects = end.hosts;
  }
  silent.insert(doubtful.begin(), doubtful.end());
  std::set<std::string> failed(end.hosts.begin(), end.hosts.end());
  failed.insert(silent.begin(), silent.end());
  memory_.back = std::exchange(memory_.away, {});
  for (const std::string& host : failed)
    if (++memory_.failures[host] >= options_.limits.host_failures() && doubtful.count(host) == 0)
      leave_out(host, verdict);
  for (const std::string& host : silent) {
    if (contains(memory_.left_out, host) || !may_go_without(host)) continue;
    memory_.away.push_back(host);
    verdict.away_now.push_back(host);
  }
  layout_ = layout_without(left_out());
}

Verdict Recovery::give_up(const std::string& text) const {
  return {.restarts = false, .exit_code = kExitFailed, .text = text};
}

Verdict Recovery::after(const AttemptEnd& end) {
  using Kind = AttemptEnd::Kind;
  memory_.trained = memory_.trained || end.trained;
  switch (end.kind) {
    case Kind::done:
      return {.restarts = false, .exit_code = 0, .text = "the run is done"};
    case Kind::stopped:
      return {.restarts = false, .exit_code = kExitRestart, .text = end.text};
    case Kind::settings:
      if (memory_.trained) break;  // they were right before: a GPU is gone, a file cannot be read
      return {.restarts = false, .exit_code = kExitSettings, .text = end.text};
    case Kind::gave_up:
      return give_up(end.text);
    case Kind::failed:
    case Kind::lost:
    case Kind::not_begun:
      break;
  }
  if (end.saved_step > memory_.best_saved) {
    memory_.best_saved = end.saved_step;
    memory_.without_progress = 0;
    memory_.crashes.clear();
    memory_.failures.clear();
  }
  return restart(end);
}

Verdict Recovery::restart(const AttemptEnd& end) {
  if (Verdict without; !end.stuck.empty() && !leave_out(end.stuck_host, without))
    return {.restarts = false,
            .exit_code = kExitRestart,
            .text = concat("these do not die, even of SIGKILL: ", end.stuck, " on ", end.stuck_host,
                           ", without which too few ranks are left; the same ",
                           "command goes on, on other machines or once they are gone")};
  const bool begun = end.kind != AttemptEnd::Kind::not_begun;
  if (!begun && memory_.trained) return wait_for_machines(end);
  memory_.in_vain = 0;
  memory_.waited = 0;
  const int64_t step = begun ? end.step : kBeforeSteps;
  ++memory_.crashes[step];
  int64_t crashes = 0;  // at this step, or what may have been this step
  for (auto at = memory_.crashes.lower_bound(step - end.steps_unheard);
       at != memory_.crashes.upper_bound(step + end.steps_unheard); ++at)
    if ((at->first == kBeforeSteps) == !begun) crashes += at->second;
  if (crashes >= options_.limits.crash_loop()) {
    Verdict verdict = give_up(concat(
        "a crash loop: ", crashes,
        begun ? concat(" failures at step ", end.step + 1, " without a checkpoint between them")
              : std::string(" attempts ended before their ranks had come"),
        "; the latest: ", end.text,
        ". Starting again would repeat it: mend that first (launch.crash_loop)"));
    verdict.crash_loop = true;
    return verdict;
  }
  if (memory_.without_progress >= options_.limits.max_restarts())
    return give_up(concat(memory_.without_progress,
                          " restarts without a new checkpoint; the latest: ", end.text,
                          " (launch.max_restarts)"));
  Verdict verdict{.restarts = true, .text = end.text};
  if (!end.stuck.empty()) verdict.left_out_now.push_back(end.stuck_host);
  choose_hosts(end, verdict);
  if (memory_.without_progress > 0)
    verdict.pause = std::min(kLongestPause, options_.limits.backoff_seconds() *
                                                std::pow(2, double(memory_.without_progress - 1)));
  ++memory_.restarts;
  ++memory_.without_progress;
  return verdict;
}

// What has trained can train: a machine starts again, a switch, a disk is full. That is no crash
// loop and takes its time.
Verdict Recovery::wait_for_machines(const AttemptEnd& end) {
  if (memory_.waited >= options_.limits.unreachable_seconds())
    return {.restarts = false,
            .exit_code = kExitRestart,
            .text = concat(memory_.in_vain + 1, " attempts in a row ended before their ranks had ",
                           "come (launch.unreachable_seconds); the latest: ", end.text,
                           options_.hosts.size() > 1 && options_.limits.min_ranks() == 0
                               ? "; launch.min_ranks lets a run go on without a machine"
                               : "")};
  Verdict verdict{.restarts = true, .text = end.text};
  choose_hosts(end, verdict);
  verdict.pause =
      std::min(kLongestPause, std::max(kShortestPause, options_.limits.backoff_seconds()) *
                                  std::pow(2, double(std::min<int64_t>(memory_.in_vain, 30))));
  memory_.waited += verdict.pause;
  ++memory_.in_vain;
  ++memory_.restarts;
  return verdict;
}

std::string memory_json(const RecoveryMemory& memory) {
  std::string crashes, failures;
  const auto names = [](const std::vector<std::string>& hosts) {
    std::string text;
    for (const std::string& host : hosts) text += (text.empty() ? "" : ",") + json_text(host);
    return text;
  };
  for (const auto& [step, count] : memory.crashes)
    crashes += concat(crashes.empty() ? "" : ",", "[", step + 1, ",", count, "]");
  for (const auto& [host, count] : memory.failures)
    failures += concat(failures.empty() ? "" : ",", json_text(host), ":", count);
  return concat(
      "{\"restarts\":", memory.restarts, ",\"without_progress\":", memory.without_progress,
      ",\"checkpoints\":", memory.best_saved + 1, ",\"trained\":", int(memory.trained),
      ",\"in_vain\":", memory.in_vain, ",\"waited\":", int64_t(memory.waited), ",\"crashes\":[",
      crashes, "],\"failures\":{", failures, "},\"left_out\":[", names(memory.left_out),
      "],\"away\":[", names(memory.away), "],\"back\":[", names(memory.back), "],\"suspects\":[",
      names(memory.suspects), "],\"cleared\":[", names(memory.cleared), "]}");
}

void read_memory(JsonReader& json, RecoveryMemory& memory) {
  const auto read_names = [&](std::vector<std::string>& names) {
    json.list([&] { names.push_back(unescaped(json.string())); });
  };
  json.object([&](std::string_view key) {
    if (key == "restarts") {
      memory.restarts = json.integer();
    } else if (key == "without_progress") {
      memory.without_progress = json.integer();
    } else if (key == "checkpoints") {
      memory.best_saved = json.integer() - 1;
    } else if (key == "trained") {
      memory.trained = json.integer() != 0;
    } else if (key == "in_vain") {
      memory.in_vain = json.integer();
    } else if (key == "waited") {
      memory.waited = double(json.integer());
    } else if (key == "crashes") {
      json.list([&] {
        std::vector<int64_t> pair;
        json.list([&] { pair.push_back(json.integer()); });
        if (pair.size() == 2) memory.crashes[pair[0] - 1] = pair[1];
      });
    } else if (key == "failures") {
      json.object(
          [&](std::string_view host) { memory.failures[unescaped(host)] = json.integer(); });
    } else if (key == "left_out") {
      read_names(memory.left_out);
    } else if (key == "away") {
      read_names(memory.away);
    } else if (key == "back") {
      read_names(memory.back);
    } else if (key == "suspects") {
      read_names(memory.suspects);
    } else if (key == "cleared") {
      read_names(memory.cleared);
    } else {
      json.skip();
    }
  });
}

}  // namespace moemamba
