#pragma once
#include <deque>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "launcher/supervisor/run_view.h"

namespace moemamba {

// Finds out from what the ranks of one attempt say, and from their silence, that one of them is
// lost, hangs or is slow. It reads no clock: `now` comes from the caller, as all times of RunView.

struct WatchLimits {
  double lost = 5;  // seconds, as all but the share; launch_config.proto says what each is
  double hang = 10, start = 300, save = 600, evaluation = 600;
  double straggler_share = 0.2;
  int64_t straggler_steps = 50;
};

struct Trouble {
  enum class Kind { silent, hang } kind = Kind::silent;
  int rank = -1;     // whose fault it is; -1: nobody's that is known
  std::string text;  // one sentence
};

class Watch {
 public:
  Watch(const WatchLimits& limits, int ranks);

  // A step of `rank` has ended; view.of_ranks has its numbers already. Returns ranks that became
  // stragglers by it, with one sentence each.
  std::vector<std::pair<int, std::string>> stepped(RunView& view, int rank, int64_t step,
                                                   int64_t tokens);
  // The attempt was begun by another supervisor, whose step_limit() that was.
  void go_on(double step_limit) { known_limit_ = step_limit; }
  // Seconds without progress that a step may take; 0: none has ended yet.
  double step_limit() const;
  // Marks ranks as silent or hanging; the first trouble there is. To be called a few times a
  // second: where it was not, this process was held up itself, and nobody is judged before the
  // ranks had time to be heard again.
  std::optional<Trouble> look(RunView& view, double now);

  // Seconds without progress that a rank may take at what it is at.
  double limit_of(const RankView& rank) const;

 private:
  std::optional<Trouble> find_silent(RunView& view, double now) const;
  std::optional<Trouble> find_hang(RunView& view, double now) const;
  void compare(RunView& view, int64_t step, std::vector<std::pair<int, std::string>>& found);

  WatchLimits limits_;
  double looked_ = -1, not_before_ = 0;
  std::deque<double> steps_;  // seconds of the latest hundred
  double slowest_ = 0;        // of them
  double known_limit_ = 0;    // while there are none: of those before; 0: there were none
  // Of steps that not all ranks have ended: busy seconds of each per token; negative: not ended.
  std::map<int64_t, std::vector<double>> pace_;
  std::vector<int64_t> slow_steps_;  // in a row, of each rank
};

// What each rank is at, for people: a table, in which `culprit` is marked (-1: none).
std::string table_of(const RunView& view, int culprit, double now);
// "rank 3 on node17 (process 4711, NVIDIA H100)": as much of it as is known.
std::string name_of(const RankView& rank);
// "step 12, backward, layer 3, in collective 481 (expert), 120 of 512 rows"
std::string activity_text(const RankView& rank);

}  // namespace moemamba
