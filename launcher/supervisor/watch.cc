#include "launcher/supervisor/watch.h"

#include <algorithm>
#include <cstdio>
#include <tuple>

#include "core/error.h"

namespace moemamba {

namespace {

constexpr size_t kRecentSteps = 100;
constexpr double kSlowestFactor = 5;  // times the slowest of them is still no hang
constexpr size_t kOpenSteps = 200;    // that ranks may be apart in what they have reported
constexpr double kHeldUp = 1;         // seconds between two looks after which nothing is judged

bool is_there(const RankView& rank) {
  return rank.state != RankState::absent && rank.state != RankState::ended;
}

std::string seconds_text(double seconds) {
  char text[32];
  std::snprintf(text, sizeof text, seconds < 10 ? "%.1f s" : "%.0f s", seconds);
  return text;
}

// Which of the ranks all others wait for: the one that has begun the fewest collectives; of several
// such, one that is in none, and then the one without progress for longest. -1: all are inside of
// the same one, and none is behind.
int rank_behind(const RunView& view) {
  const RankView* behind = nullptr;
  bool all_same = true;
  const auto key = [](const RankView& rank) {
    return std::tuple(rank.activity.collective, rank.activity.in_collective, rank.progressed);
  };
  for (const RankView& rank : view.of_ranks) {
    if (!is_there(rank)) continue;
    if (behind && (rank.activity.collective != behind->activity.collective ||
                   rank.activity.in_collective != behind->activity.in_collective))
      all_same = false;
    if (!behind || key(rank) < key(*behind)) behind = &rank;
  }
  if (!behind) return -1;
  return all_same && behind->activity.in_collective && view.ranks > 1 ? -1 : behind->rank;
}

const char* state_text(RankState state) {
  switch (state) {
    case RankState::absent:
      return "absent";
    case RankState::alive:
      return "alive";
    case RankState::silent:
      return "silent";
    case RankState::hanging:
      return "hanging";
    case RankState::ended:
      return "ended";
  }
  return "";
}

}  // namespace

Watch::Watch(const WatchLimits& limits, int ranks)
    : limits_(limits), slow_steps_(size_t(ranks), 0) {}

double Watch::limit_of(const RankView& rank) const {
  switch (latest_of(rank).phase) {
    case Phase::starting:
    case Phase::loading:
      return limits_.start;
    case Phase::evaluation:
      return std::max(limits_.hang, limits_.evaluation);
    case Phase::hashing:
    case Phase::saving:
    case Phase::finishing:
      return std::max(limits_.hang, limits_.save);
    default:
      break;
  }
  if (rank.step < 0 && known_limit_ == 0)
    return std::max(limits_.hang, limits_.start);  // its first step
  return std::max(limits_.hang, step_limit());
}

double Watch::step_limit() const {
  return steps_.empty() ? known_limit_ : std::max(limits_.hang, kSlowestFactor * slowest_);
}

std::optional<Trouble> Watch::look(RunView& view, double now) {
  if (looked_ >= 0 && now - looked_ > kHeldUp) not_before_ = now + limits_.lost;
  looked_ = now;
  if (now < not_before_) return std::nullopt;
  if (auto silent = find_silent(view, now)) return silent;
  return find_hang(view, now);
}

std::optional<Trouble> Watch::find_silent(RunView& view, double now) const {
  std::optional<Trouble> found;
  for (RankView& rank : view.of_ranks) {
    if (!is_there(rank)) continue;
    const double silence = now - rank.heard;
    if (silence <= limits_.lost) continue;
    rank.state = RankState::silent;
    if (!found)
      found = {.kind = Trouble::Kind::silent,
               .rank = rank.rank,
               .text = concat(name_of(rank), " has been silent for ", seconds_text(silence),
                              "; it was at ", activity_text(rank))};
  }
  return found;
}

// While one of them moves, and while one is at something that may take its time, none hangs: the
// others wait for it.
std::optional<Trouble> Watch::find_hang(RunView& view, double now) const {
  double moved = view.started, limit = 0;
  const RankView* absent = nullptr;
  for (const RankView& rank : view.of_ranks) {
    if (rank.state == RankState::absent && !absent) absent = &rank;
    if (!is_there(rank)) continue;
    moved = std::max(moved, rank.progressed);
    limit = std::max(limit, limit_of(rank));
  }
  if (absent) limit = std::max(limit, limits_.start);
  if (limit == 0 || now - moved <= limit) return std::nullopt;  // 0: all have said goodbye
  Trouble trouble{.kind = Trouble::Kind::hang, .rank = absent ? absent->rank : rank_behind(view)};
  const std::string still = concat("no progress for ", seconds_text(now - moved), ": ");
  if (absent) {
    trouble.text = concat(still, "rank ", absent->rank, " has not come");
  } else if (trouble.rank < 0) {
    trouble.text = still + "no rank is behind the others; the network, or MPI, stands still";
  } else {
    RankView& rank = view.of_ranks[size_t(trouble.rank)];
    rank.state = RankState::hanging;
    trouble.text = concat(still, name_of(rank), " hangs at ", activity_text(rank));
  }
  return trouble;
}

std::vector<std::pair<int, std::string>> Watch::stepped(RunView& view, int rank, int64_t step,
                                                        int64_t tokens) {
  std::vector<std::pair<int, std::string>> found;
  const RankView& of = view.of_ranks[size_t(rank)];
  const auto made = pace_.try_emplace(step, slow_steps_.size(), -1.0).first;
  made->second[size_t(rank)] = tokens > 0 ? of.busy_seconds / double(tokens) : 0;
  if (rank == 0) {  // a step takes all ranks about as long
    steps_.push_back(of.step_seconds);
    if (steps_.size() > kRecentSteps) steps_.pop_front();
    slowest_ = *std::max_element(steps_.begin(), steps_.end());
  }
  const std::vector<double>& pace = made->second;
  if (std::find_if(pace.begin(), pace.end(), [](double p) { return p < 0; }) == pace.end()) {
    compare(view, step, found);
    pace_.erase(pace_.begin(), pace_.upper_bound(step));  // older ones lack a report for good
  }
  if (pace_.size() > kOpenSteps) pace_.erase(pace_.begin());
  return found;
}

// Against the median of the ranks that have tokens; of an even number the faster one of the middle,
// so that of two ranks one can be slow.
void Watch::compare(RunView& view, int64_t step, std::vector<std::pair<int, std::string>>& found) {
  const std::vector<double>& pace = pace_.at(step);
  std::vector<double> sorted;
  for (double p : pace)
    if (p > 0) sorted.push_back(p);
  if (sorted.size() < 2) return;
  const auto middle = sorted.begin() + std::ptrdiff_t((sorted.size() - 1) / 2);
  std::nth_element(sorted.begin(), middle, sorted.end());
  for (size_t r = 0; r < pace.size(); ++r) {
    RankView& rank = view.of_ranks[r];
    const bool slow = pace[r] > *middle * (1 + limits_.straggler_share);
    slow_steps_[r] = slow ? slow_steps_[r] + 1 : 0;
    if (!slow) rank.straggler = false;
    if (slow_steps_[r] != limits_.straggler_steps) continue;
    rank.straggler = true;
    found.emplace_back(int(r),
                       concat(name_of(rank), " has been ", int((pace[r] / *middle - 1) * 100 + 0.5),
                              " % slower per token than the median of the ranks for ",
                              limits_.straggler_steps, " steps"));
  }
}

std::string name_of(const RankView& rank) {
  std::string more;
  if (rank.pid > 0) more += concat(" (process ", rank.pid);
  if (!rank.gpu.empty()) more += concat(more.empty() ? " (" : ", ", rank.gpu);
  if (!more.empty()) more += ")";
  return concat("rank ", rank.rank, rank.host.empty() ? "" : " on " + rank.host, more);
}

Activity::Now latest_of(const RankView& rank) {
  Activity::Now at = rank.activity;
  if (!rank.reported || at.step > rank.step) return at;
  at.step = rank.step + 1;
  at.phase = Phase::data;
  at.layer = at.rows_expected = at.rows_received = -1;
  at.in_collective = false;
  return at;
}

std::string activity_text(const RankView& rank) {
  const Activity::Now at = latest_of(rank);
  std::string text = concat("step ", at.step, ", ", phase_name(at.phase));
  if (at.layer >= 0) text += concat(", layer ", at.layer);
  if (at.collective > 0)
    text += concat(at.in_collective ? ", in collective " : ", after collective ", at.collective,
                   rank.group.empty() ? "" : " (" + rank.group + ")");
  if (at.rows_expected >= 0)
    text += concat(", ", std::max<int64_t>(0, at.rows_received), " of ", at.rows_expected, " rows");
  return text;
}

std::string table_of(const RunView& view, int culprit, double now) {
  const std::vector<std::string> heads = {
      "rank",  "host",       "pid",   "gpu",  "state",      "step",           "phase",
      "layer", "collective", "group", "rows", "silent for", "no progress for"};
  std::vector<std::vector<std::string>> lines{heads};
  for (const RankView& rank : view.of_ranks) {
    const Activity::Now at = latest_of(rank);
    const bool known = rank.state != RankState::absent;
    const auto if_known = [&](const std::string& text) { return known ? text : "-"; };
    lines.push_back({concat(rank.rank == culprit ? ">" : "", rank.rank), if_known(rank.host),
                     if_known(concat(rank.pid)), rank.gpu.empty() ? "-" : rank.gpu,
                     state_text(rank.state), if_known(concat(at.step)),
                     if_known(phase_name(at.phase)), at.layer < 0 ? "-" : concat(at.layer),
                     if_known(concat(at.collective, at.in_collective ? " in" : "")),
                     rank.group.empty() ? "-" : rank.group,
                     at.rows_expected < 0
                         ? "-"
                         : concat(std::max<int64_t>(0, at.rows_received), "/", at.rows_expected),
                     if_known(seconds_text(now - rank.heard)),
                     if_known(seconds_text(now - rank.progressed))});
  }
  std::vector<size_t> widths(heads.size(), 0);
  for (const auto& line : lines)
    for (size_t i = 0; i < line.size(); ++i) widths[i] = std::max(widths[i], line[i].size());
  std::string text;
  for (const auto& line : lines) {
    std::string row = "  ";
    for (size_t i = 0; i < line.size(); ++i)
      row += line[i] + std::string(i + 1 < line.size() ? widths[i] - line[i].size() + 2 : 0, ' ');
    text += row + "\n";
  }
  return text;
}

}  // namespace moemamba
