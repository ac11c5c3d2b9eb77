// The cable of one of two hosts is out, for a second and for good: the run survives it, starts
// again or goes on without the host, and nobody is left behind on either side.
#include <cstdio>

#include "core/random.h"
#include "tests/support/fault_test.h"
#include "tests/support/small_run.h"
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
    const double left = kNoOrphansAfter -
                        std::chrono::duration<double>(Launched::Clock::now() - fault.time).count();
    const bool gone = wait_until(
        [&] { return fits(0, 2, 1, 0) && fits(1, size_t(far_ranks), 0, size_t(far_ranks)); },
        std::max(left, 1.0));
    EXPECT_TRUE(gone) << launched.said();
    for (int host = 0; !gone && host < hosts.count(); ++host)
      for (pid_t id : hosts.processes(host))
        std::printf("on %s: %d %s", hosts.name(host).c_str(), int(id),
                    words_of(id, "comm").c_str());
  }
  // The lines of all steps, each once and in order.
  void expect_every_step(const Launched& launched) const {
    const std::vector<double> steps =
        numbers_of(read_file(join_path(launched.run(), "metrics.jsonl")), "step");
    ASSERT_EQ(int64_t(steps.size()), kSteps);
    for (size_t i = 0; i < steps.size(); ++i) ASSERT_EQ(steps[i], double(i));
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
  outcome.next_step = std::chrono::duration<double>(Launched::Clock::now() - before.time).count();
  return outcome;
}

TEST_F(FaultLink, CutForASecondIsSurvivedOrStartsAgain) {
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
    while (!HasFailure() && launched.steps() < kSteps * 3 / 4) {
      pause_for(random.uniform(draw++) * 0.3);
      const int host = random.uniform(draw++) < 0.5 ? 0 : 1;
      const double length = table.cases() == 0 ? 1 : 0.1 + 1.9 * random.uniform(draw++);
      const Launched::Before before = launched.before();
      hosts.cut(host);
      pause_for(length);
      hosts.mend(host);
      const Outcome outcome = survives(launched, before, kPatience);
      if (!outcome.went_on() && launched.has_ended()) break;
      EXPECT_TRUE(outcome.went_on()) << launched.said();
      table.add(launched.attempt() > before.attempt ? "link cut for 0.1 to 2 s, restarted"
                                                    : "link cut for 0.1 to 2 s, survived",
                outcome);
      expect_no_orphans(launched, hosts, before, 1);
      if (soak_seconds() == 0) break;
    }
    EXPECT_EQ(launched.end(kPatience + 60), 0) << launched.said();
    expect_whole(launched, whole);
    clear();
  } while (!HasFailure() &&
           Launched::Clock::now() - begin < std::chrono::seconds(soak_seconds() / 2));
  table.print();
}

TEST_F(FaultLink, CutForGoodGoesOnWithoutTheHost) {
  const Random random(test_seed(), "long cuts");
  uint64_t draw = 0;
  FaultTable table;
  const auto begin = Launched::Clock::now();
  do {
    // With the limits that users have, once.
    const char* limits = table.cases() == 0 ? "" : kQuickLimits;
    const int host = table.cases() == 0 || random.uniform(draw++) < 0.5 ? 1 : 0;
    Hosts hosts(*this / "", 2, 1);
    Launched launched(*this / "", run(), command(hosts, limits), &hosts);
    launched.start();
    ASSERT_TRUE(wait_until([&] { return launched.is_saved(); }, kPatience)) << launched.said();
    pause_for(random.uniform(draw++) * 0.5);
    const Launched::Before before = launched.before();
    hosts.cut(host);
    const Outcome outcome = launched.go_on_after(before, kPatience);
    EXPECT_TRUE(outcome.went_on()) << launched.said();
    table.add("link cut for good", outcome);
    EXPECT_LT(outcome.found, 5 + 10);
    expect_no_orphans(launched, hosts, before, 0);
    const std::vector<LoggedEvent> left_out = launched.events("host_left_out");
    ASSERT_EQ(left_out.size(), 1u) << launched.said();
    EXPECT_EQ(count(left_out[0].text, hosts.name(1) + " is left out"), 1) << left_out[0].text;
    EXPECT_EQ(launched.end(kPatience + 60), 0) << launched.said();
    expect_every_step(launched);
    expect_nothing_left(launched);
    clear();
  } while (!HasFailure() &&
           Launched::Clock::now() - begin < std::chrono::seconds(soak_seconds() / 2));
  table.print();
}

}  // namespace
}  // namespace moemamba
