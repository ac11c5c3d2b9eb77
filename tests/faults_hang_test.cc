// A rank that stands still: stopped by SIGSTOP while it waits for others, saves or gets its data,
// or hanging in its own code. It is found within the limit and named, and the run goes on.
#include <signal.h>

#include <cstdio>

#include "core/random.h"
#include "tests/support/fault_test.h"
#include "tests/support/soak.h"

namespace moemamba {
namespace {

constexpr int64_t kSteps = 700;
constexpr double kBusy = 10;  // seconds beyond a limit, on a busy machine

class FaultHang : public FaultTest {
 protected:
  // "rank 1 on node (process 4711...": the event names it, and nobody else.
  static void expect_named(const Outcome& outcome, const char* kind, int rank, pid_t process) {
    EXPECT_EQ(outcome.event.kind, kind) << outcome.event.text;
    const std::string name = "rank " + std::to_string(rank) + " on ";
    EXPECT_EQ(count(outcome.event.text, name), 1) << outcome.event.text;
    EXPECT_EQ(count(outcome.event.text, "(process " + std::to_string(process)), 1)
        << outcome.event.text;
  }
};

struct Place {
  const char* name;
  const char* words;  // that make it likely that the victim is there
  int victim;
  bool stops_itself;  // by a drill
};
// The other rank takes its time; a save after every step that training waits for; at a step's
// begin.
const Place kPlaces[] = {
    {"in a collective", " --drill \"slow rank=0 factor=20 from=0\"", 1, false},
    {"in a save", " --train.save_interval=1 --checkpoint.asynchronous=false", 0, false},
    {"in data loading", " --drill \"stop rank=1 step=200\"", 1, true}};

TEST_F(FaultHang, OfAStoppedRankIsFoundAndNamed) {
  const Whole whole = undisturbed(kSteps);
  const Random random(test_seed(), "stopped ranks");
  uint64_t draw = 0;
  FaultTable table;
  const auto begin = Launched::Clock::now();
  do {
    for (const Place& place : kPlaces) {
      // With the limits that users have, once.
      const bool defaults = table.cases() == 0;
      const double limit = defaults ? 5 : 2.5;
      Launched launched(*this / "", run(),
                        words(kSteps) + (defaults ? "" : kQuickLimits) + place.words);
      launched.start();
      ASSERT_TRUE(wait_until([&] { return launched.is_saved(); }, kPatience)) << launched.said();
      // Until its drill has stopped it, or a random moment.
      pid_t victim = 0;
      Launched::Before before;
      if (place.stops_itself) {
        ASSERT_TRUE(wait_until(
            [&] {
              before = launched.before();
              const Processes processes = launched.processes();
              if (processes.ranks.size() != 2) return false;
              victim = processes.ranks[size_t(place.victim)];
              return words_of(victim, "stat").find(") T ") != std::string::npos;
            },
            kPatience))
            << launched.said();
      } else {
        pause_for(random.uniform(draw++) * 0.5);
        const Processes processes = launched.processes();
        ASSERT_EQ(processes.ranks.size(), 2u);
        victim = processes.ranks[size_t(place.victim)];
        before = launched.before();
        kill(victim, SIGSTOP);
      }
      const Outcome outcome = launched.go_on_after(before, kPatience);
      EXPECT_TRUE(outcome.went_on()) << launched.said();
      expect_named(outcome, "lost", place.victim, victim);
      EXPECT_LT(outcome.found, limit + kBusy);
      std::printf("  %s\n", outcome.event.text.c_str());
      table.add(std::string("SIGSTOP ") + place.name + (defaults ? ", default limits" : ""),
                outcome);
      explain(launched, before, outcome, limit + 5);
      EXPECT_EQ(launched.end(kPatience + 60), 0) << launched.said();
      expect_whole(launched, whole);
      clear();
      if (HasFailure()) break;
    }
  } while (!HasFailure() &&
           Launched::Clock::now() - begin < std::chrono::seconds(soak_seconds() * 3 / 4));
  table.print();
}

TEST_F(FaultHang, InItsOwnCodeIsFoundAndNamedWithItsStack) {
  const Whole whole = undisturbed(kSteps);
  FaultTable table;
  const Random random(test_seed(), "hanging ranks");
  uint64_t draw = 0;
  const auto begin = Launched::Clock::now();
  do {
    const bool defaults = table.cases() == 0;
    const double limit = defaults ? 10 : 3;
    const auto step = int64_t(30 + random.uniform(draw++) * 400);
    const int rank = random.uniform(draw++) < 0.5 ? 0 : 1;
    Launched launched(*this / "", run(),
                      words(kSteps) + (defaults ? "" : kQuickLimits) +
                          concat(" --drill \"hang rank=", rank, " step=", step, "\""));
    launched.start();
    ASSERT_TRUE(wait_until([&] { return launched.steps() >= step; }, kPatience)) << launched.said();
    const Launched::Before before = launched.before();
    const Processes processes = launched.processes();
    ASSERT_EQ(processes.ranks.size(), 2u) << launched.said();
    const Outcome outcome = launched.go_on_after(before, kPatience);
    EXPECT_TRUE(outcome.went_on()) << launched.said();
    expect_named(outcome, "hang", rank, processes.ranks[size_t(rank)]);
    EXPECT_LT(outcome.found, limit + kBusy);
    EXPECT_EQ(count(launched.said(), "its stack:"), 1) << launched.said();
    std::printf("  %s\n", outcome.event.text.c_str());
    table.add(std::string("a rank hangs") + (defaults ? ", default limits" : ""), outcome);
    explain(launched, before, outcome, limit + 5);
    EXPECT_EQ(launched.end(kPatience + 60), 0) << launched.said();
    expect_whole(launched, whole);
    clear();
  } while (!HasFailure() &&
           Launched::Clock::now() - begin < std::chrono::seconds(soak_seconds() / 4));
  table.print();
}

}  // namespace
}  // namespace moemamba
