// The cable of one of two hosts is out, for a second and for good: the run survives it, starts
// again or goes on without the host, and nobody is left behind on either side.
#include <signal.h>

#include <cstdio>

#include "core/random.h"
#include "tests/support/fault_test.h"
#include "tests/support/soak.h"

namespace moemamba {
namespace {

constexpr int64_t kSteps = 2000;
constexpr double kNoOrphansAfter = 15;  // seconds

class FaultLink : public FaultTest {
 protected:
  void SetUp() override {
    if (const std::string why = Hosts::cannot_be_made(); !why.empty()) GTEST_SKIP() << why;
  }
  // Words, limits and hosts of a run that may go on with one rank.
  std::string command(const Hosts& hosts, const char* limits) const {
    return words(kSteps) + limits + " --launch.min_ranks=1 --launch.hostfile=" + hosts.hostfile();
  }
  // After kNoOrphansAfter there are, on each host, no processes but those of the attempt at hand.
  void expect_no_orphans(const Launched& launched, const Hosts& hosts,
                         const Launched::Before& fault, int far_ranks) const {
    const auto fits = [&](int host, size_t ranks, size_t mpiruns, size_t orteds) {
      return launched.has_ended() || (hosts.processes(host, "moemamba").size() == ranks &&
                                      hosts.processes(host, "mpirun").size() == mpiruns &&
                                      hosts.processes(host, "orted").size() == orteds);
    };
    const double left = kNoOrphansAfter - seconds_since(fault.time);
    const bool gone = wait_until(
        [&] { return fits(0, 2, 1, 0) && fits(1, size_t(far_ranks), 0, size_t(far_ranks)); },
        std::max(left, 1.0));
    EXPECT_TRUE(gone) << launched.said();
    for (int host = 0; !gone && host < hosts.count(); ++host)
      for (pid_t id : hosts.processes(host))
        std::printf("on %s: %d %s", hosts.name(host).c_str(), int(id),
                    words_of(id, "comm").c_str());
  }
};

// Either the steps go on, or another attempt's do.
Outcome survives(const Launched& launched, const Launched::Before& before, double seconds) {
  wait_until(
      [&] {
        return launched.has_ended() || launched.attempt() > before.attempt ||
               launched.steps() > before.steps + 20;
      },
      seconds);
  if (launched.attempt() > before.attempt || launched.has_ended())
    return launched.go_on_after(before, seconds);
  Outcome outcome;
  outcome.next_step = seconds_since(before.time);
  return outcome;
}

TEST_F(FaultLink, CutForAMomentIsSurvivedOrStartsAgain) {
  const Whole whole = undisturbed(kSteps);
  Hosts hosts(*this / "", 2, 1);
  const Random random(test_seed(), "short cuts");
  uint64_t draw = 0;
  FaultTable table;
  const auto begin = Launched::Clock::now();
  do {
    Launched launched(*this / "", run(), command(hosts, kQuickLimits), &hosts);
    launched.start();
    ASSERT_TRUE(wait_until([&] { return launched.is_saved(); }, kPatience)) << launched.said();
    expect_listens_on(launched.supervisor(), {"127.0.0.1", hosts.address(0)}, 2, &hosts);
    while (!HasFailure() && launched.steps() < kSteps * 3 / 4) {
      pause_for(random.uniform(draw++) * 0.3);
      const int host = random.uniform(draw++) < 0.5 ? 0 : 1;
      // One in four is about as long as what makes a rank lost.
      const bool is_long = table.cases() > 0 && random.uniform(draw++) < 0.25;
      const double length = table.cases() == 0 ? 1
                            : is_long          ? 2 + 2.5 * random.uniform(draw++)
                                               : 0.1 + 1.9 * random.uniform(draw++);
      const Launched::Before before = launched.before();
      hosts.cut(host);
      pause_for(length);
      hosts.mend(host);
      const Outcome outcome = survives(launched, before, kPatience);
      if (!outcome.went_on() && launched.has_ended()) break;
      EXPECT_TRUE(outcome.went_on()) << launched.said();
      const bool again = launched.attempt() > before.attempt;
      table.add(std::string("link cut for ") + (is_long ? "2 to 4.5 s, " : "0.1 to 2 s, ") +
                    (again ? "restarted" : "survived"),
                outcome);
      explain(launched, before, outcome, 12);
      expect_no_orphans(launched, hosts, before, 1);
      if (soak_seconds() == 0) break;
    }
    EXPECT_EQ(launched.end(kPatience + 60), 0) << launched.said();
    expect_whole(launched, whole);
    clear();
  } while (!HasFailure() && seconds_since(begin) < double(soak_seconds()) * 0.4);
  table.print();
}

TEST_F(FaultLink, CutForGoodGoesOnWithoutTheHost) {
  const Whole whole = undisturbed(kSteps);
  const Random random(test_seed(), "long cuts");
  uint64_t draw = 0;
  FaultTable table;
  const auto begin = Launched::Clock::now();
  do {
    // With the limits that users have, once.
    const bool defaults = table.cases() == 0;
    const int host = defaults || random.uniform(draw++) < 0.5 ? 1 : 0;
    const bool amid = !defaults && random.uniform(draw++) < 0.3;
    Hosts hosts(*this / "", 2, 1);
    Launched launched(*this / "", run(), command(hosts, defaults ? "" : kQuickLimits), &hosts);
    launched.start();
    ASSERT_TRUE(wait_until([&] { return launched.is_saved(); }, kPatience)) << launched.said();
    pause_for(random.uniform(draw++) * 0.5);
    const Processes processes = launched.processes();
    const Launched::Before before = launched.before();
    if (amid && !processes.ranks.empty()) {
      kill(processes.ranks.back(), SIGKILL);
      pause_for(random.uniform(draw++) * 1.5);
    }
    hosts.cut(host);
    const Outcome outcome = launched.go_on_after(before, kPatience);
    EXPECT_TRUE(outcome.went_on()) << launched.said();
    table.add(amid       ? "link cut for good, amid a restart"
              : defaults ? "link cut for good, default limits"
                         : "link cut for good",
              outcome);
    explain(launched, before, outcome, 15);
    if (!amid) {
      EXPECT_LT(outcome.found, (defaults ? 5 : 2.5) + 10);
    }
    expect_no_orphans(launched, hosts, before, 0);
    const std::vector<LoggedEvent> left_out = launched.events("host_left_out");
    ASSERT_EQ(left_out.size(), 1u) << launched.said();
    EXPECT_EQ(count(left_out[0].text, hosts.name(1) + " is left out"), 1) << left_out[0].text;
    EXPECT_EQ(launched.end(kPatience + 60), 0) << launched.said();
    expect_agrees(launched, whole, launched.events("resumed").back().step);
    clear();
  } while (!HasFailure() && seconds_since(begin) < double(soak_seconds()) * 0.6);
  table.print();
}

}  // namespace
}  // namespace moemamba
