// kill -9 of a rank, mpirun, an orted or the supervisor of a run on two hosts, at random moments:
// it goes on, and ends as the run that nobody killed.
#include <signal.h>

#include <cstdio>

#include "core/random.h"
#include "tests/support/fault_test.h"
#include "tests/support/soak.h"

namespace moemamba {
namespace {

constexpr int64_t kSteps = 2000, kQuickCases = 3;
constexpr const char* kVictims[] = {"a rank", "mpirun", "an orted", "the supervisor"};

constexpr const char* kLate = "kill -9 of the supervisor, too late";

std::string kind_of(const std::string& victim) {
  return "kill -9 of " + victim;
}

class FaultKill : public FaultTest {
 protected:
  void SetUp() override {
    if (const std::string why = Hosts::cannot_be_made(); !why.empty()) GTEST_SKIP() << why;
  }
};

// What there is to be killed; 0: nothing of the kind at this moment.
pid_t find(const Launched& launched, const Hosts& hosts, size_t victim, uint64_t draw) {
  const Processes processes = launched.processes();
  if (victim == 3) return launched.supervisor();
  const std::vector<pid_t> those = victim == 0   ? processes.ranks
                                   : victim == 1 ? processes.mpiruns
                                                 : hosts.processes(1, "orted");
  return those.empty() ? 0 : those[draw % those.size()];
}

// The command again, after a while in which the ranks go on, or so late that they have given up.
// False: the supervisor had ended by itself when it was to be killed, for the run was done.
bool start_again(Launched& launched, bool late) {
  const int code = launched.end(kPatience);
  if (code != 0) EXPECT_EQ(code, -SIGKILL);
  if (code == 0) {
    EXPECT_EQ(launched.steps(), kSteps) << launched.said();
  } else if (late) {
    EXPECT_TRUE(wait_until([&] { return launched.processes_left().empty(); }, 15))
        << "ranks outlive their fence";
  } else {
    launched.wait_for_steps(3, 2);
  }
  launched.start();
  return code != 0;
}

TEST_F(FaultKill, OfAnythingLeavesTheRunAsItWouldHaveBeen) {
  const Whole whole = undisturbed(kSteps);
  ASSERT_EQ(int64_t(whole.chain.size()), kSteps);
  const Hosts hosts(*this / "", 2, 1);
  const std::string command = words(kSteps) + " --launch.hostfile=" + hosts.hostfile();
  const Random random(test_seed(), "faults by kill");
  uint64_t draw = 0;
  const auto uniform = [&](double below) { return random.uniform(draw++) * below; };
  FaultTable table;
  std::printf("seed %llu\n", static_cast<unsigned long long>(test_seed()));
  const auto begin = Launched::Clock::now();
  const auto enough = [&] {
    for (const char* victim : kVictims)
      if (table.cases(kind_of(victim)) < kQuickCases) return false;
    return seconds_since(begin) >= double(soak_seconds());
  };
  while (!enough() && !HasFailure()) {
    Launched launched(*this / "", run(), command, &hosts);
    launched.start();
    ASSERT_TRUE(wait_until([&] { return launched.is_saved(); }, kPatience)) << launched.said();
    for (bool amid = false; !enough() && !HasFailure() && launched.steps() < kSteps * 9 / 10;) {
      const size_t victim = size_t(uniform(double(std::size(kVictims))));
      std::string kind = kind_of(kVictims[victim]);
      if (soak_seconds() == 0 && !amid && table.cases(kind) >= kQuickCases) continue;
      pause_for(uniform(amid ? 1.5 : 0.4));
      // One is too late: that takes the fence's time twice.
      const bool late =
          victim == 3 && uniform(1) < 0.1 && (soak_seconds() > 0 || table.cases(kLate) == 0);
      const std::vector<pid_t> ranks = launched.processes().ranks;
      const Launched::Before before = launched.before();
      const pid_t hit = find(launched, hosts, victim, uint64_t(uniform(1000)));
      if (hit <= 0 || kill(hit, SIGKILL) != 0) continue;  // nothing there, amid a restart
      if (victim == 3 && !start_again(launched, late)) break;
      if (late) kind = kLate;
      if (amid) kind = "kill -9 amid a restart";
      amid = victim != 3 && uniform(1) < 0.25;
      if (amid) {
        table.add(kind, -1, -1, -1);  // what comes next is told by the one after it
        continue;
      }
      const Outcome outcome = launched.go_on_after(before, kPatience);
      if (!outcome.went_on() && launched.has_ended()) break;  // the run was done by then
      EXPECT_TRUE(outcome.went_on()) << kind << "\n" << launched.said();
      table.add(kind, outcome);
      explain(launched, before, outcome, 5);
      if (outcome.event.kind == "taken_over" && kind == kind_of(kVictims[3])) {
        EXPECT_EQ(launched.processes().ranks, ranks);
      }
    }
    EXPECT_EQ(launched.end(kPatience + 60), 0) << launched.said();
    expect_whole(launched, whole);
    clear();
  }
  table.print();
}

}  // namespace
}  // namespace moemamba
