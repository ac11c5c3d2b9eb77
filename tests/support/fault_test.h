#pragma once
#include <string>
#include <vector>

#include "runtime/checkpoint_reader.h"
#include "tests/support/fault_table.h"
#include "tests/support/launched.h"
#include "tests/support/program.h"

namespace moemamba {

// Tests that do harm to a run under `moemamba launch`.
class FaultTest : public ProgramTest {
 protected:
  // Of a run of `steps` steps on two ranks into run(), with frequent checkpoints, which is
  // restarted however often it fails.
  std::string words(int64_t steps) const;
  // The same run, by `moemamba train` and undisturbed; it is gone then.
  struct Whole {
    std::vector<std::string> chain;  // "STEP HASH"
    std::vector<double> losses;
    CheckpointManifest end;
  };
  Whole undisturbed(int64_t steps) const;

  // Fails where the run, which is done, is another than the undisturbed one, or left processes.
  void expect_whole(const Launched& launched, const Whole& whole) const;
  // The same of a run that went on from step `from` on with other ranks: equal up to there, then
  // its losses agree for a while.
  void expect_agrees(const Launched& launched, const Whole& whole, int64_t from) const;
  // Fails where a process listens on another address than these ("127.0.0.1", "10.77.0.1"), or
  // on fewer ports than at_least. hosts: it is on host 0 of these.
  void expect_listens_on(pid_t process, const std::vector<std::string>& addresses, int at_least,
                         const Hosts* hosts = nullptr) const;
  // Of one that took long: prints what was logged since, so that a soak can be understood.
  static void explain(const Launched& launched, const Launched::Before& before,
                      const Outcome& outcome, double long_seconds);
  // Fails where something of the run is left on any host after 15 s.
  void expect_nothing_left(const Launched& launched) const;
  // Ready for the next run.
  void clear() const;
};

double seconds_since(Launched::Clock::time_point begin);

// What may take its time on a busy machine.
constexpr double kPatience = 90;
// Limits of faster detection than the defaults', for cases that need not show those.
constexpr const char* kQuickLimits =
    " --launch.heartbeat_seconds=0.1 --launch.lost_seconds=2.5 --launch.hang_seconds=3"
    " --launch.fence_seconds=5";

}  // namespace moemamba
