#pragma once
#include <map>
#include <string>
#include <vector>

#include "launcher/launch_config.pb.h"

namespace moemamba {

// What becomes of a run when its ranks have ended. Pure: it starts nothing and reads no clock.
//
// A host that fails launch.host_failures times without a new checkpoint in between is left out for
// good; one that does not answer also of the next attempt, and is tried again by the one after it.

struct HostSlots {
  std::string name;
  int slots = 1;  // ranks that it takes
};

// How one attempt to run ended.
struct AttemptEnd {
  enum class Kind {
    done,       // after the last step
    stopped,    // as asked
    settings,   // wrong ones; of a run that has trained with them: an error of the machine
    gave_up,    // as its settings say; another attempt would meet the same
    failed,     // an error that a rank has named
    lost,       // ranks died, hang or fell silent
    not_begun,  // ended before all ranks had come
  };
  Kind kind = Kind::lost;
  int64_t step = 0;                      // at hand then, as far as it was heard of
  int64_t steps_unheard = 0;             // so many more may have been taken since
  int64_t saved_step = -1;               // the newest checkpoint that is there now; -1: none
  bool trained = false;                  // a step of the attempt has ended
  std::vector<std::string> hosts;        // of ranks that are at fault
  std::vector<std::string> unreachable;  // hosts that do not answer now
  std::string stuck_host, stuck;         // where processes do not die, and which; empty: all died
  std::string text;                      // why, one sentence
};

// What outlives a supervisor that dies (state.json).
struct RecoveryMemory {
  int64_t restarts = 0;
  int64_t without_progress = 0;             // of these, since the newest checkpoint
  int64_t best_saved = -1;                  // the newest checkpoint there ever was
  bool trained = false;                     // a step of any attempt has ended
  int64_t in_vain = 0;                      // attempts, the latest, whose ranks never came
  double waited = 0;                        // seconds of pauses before these
  std::map<int64_t, int64_t> crashes;       // failures since then by the step at hand, or -1
  std::map<std::string, int64_t> failures;  // since then, by host; also: it did not answer
  std::vector<std::string> left_out;        // hosts, for good
  std::vector<std::string> away;            // and those that the attempt at hand alone is without
  std::vector<std::string> back;            // that it tries again: the one before was without them
  std::vector<std::string> suspects;        // at fault when the latest that began ended
  std::vector<std::string> cleared;         // without which an attempt since then did not begin
};

struct Verdict {
  bool restarts = false;
  int exit_code = 0;                      // where it does not
  double pause = 0;                       // seconds before the restart
  std::vector<std::string> left_out_now;  // hosts, for good
  std::vector<std::string> away_now;      // hosts, of the next attempt alone
  bool crash_loop = false;
  std::string text;  // why; one sentence
};

class Recovery {
 public:
  struct Options {
    LaunchConfig limits;
    int ranks = 1, expert = 1;     // as asked for
    std::vector<HostSlots> hosts;  // empty: this machine alone
    std::string here;              // the name in that list of the machine that starts the ranks
  };
  Recovery(Options options, RecoveryMemory memory);

  Verdict after(const AttemptEnd& end);

  // Of the next attempt. With fewer hosts there are as many ranks as fit, in whole groups of
  // `expert`; where not one fits, expert falls to its largest divisor that does.
  int ranks() const { return layout_.ranks; }
  int expert() const { return layout_.expert; }
  std::vector<HostSlots> hosts() const;       // without those left out
  std::vector<std::string> left_out() const;  // for good, and of this attempt
  const RecoveryMemory& memory() const { return memory_; }

 private:
  struct Layout {
    int ranks = 0, expert = 1;
  };
  Layout layout_without(const std::vector<std::string>& left_out) const;
  int least_ranks() const;
  bool may_go_without(const std::string& host) const;
  bool leave_out(const std::string& host, Verdict& verdict);
  void forget_hosts_that_are_not_listed();
  std::vector<std::string> suspects();
  void choose_hosts(const AttemptEnd& end, Verdict& verdict);
  Verdict restart(const AttemptEnd& end);
  Verdict wait_for_machines(const AttemptEnd& end);
  Verdict give_up(const std::string& text) const;

  Options options_;
  RecoveryMemory memory_;
  Layout layout_;
};

// As JSON and back; an Error where it is none.
std::string memory_json(const RecoveryMemory& memory);
class JsonReader;
void read_memory(JsonReader& json, RecoveryMemory& memory);  // the object that comes next

}  // namespace moemamba
