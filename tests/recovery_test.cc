// What a supervisor does after each end of its ranks.
#include "launcher/supervisor/recovery.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "core/error.h"
#include "runtime/json_reader.h"

namespace moemamba {
namespace {

using Kind = AttemptEnd::Kind;

Recovery::Options options_of(int ranks, int expert = 1, std::vector<HostSlots> hosts = {}) {
  Recovery::Options options{.ranks = ranks, .expert = expert, .hosts = std::move(hosts)};
  return options;
}

AttemptEnd lost_at(int64_t step, int64_t saved, std::vector<std::string> hosts = {}) {
  return {.kind = Kind::lost,
          .step = step,
          .saved_step = saved,
          .hosts = std::move(hosts),
          .text = "rank 1 has died"};
}

TEST(Recovery, EndsWithTheExitCodeOfEachEnd) {
  const std::pair<Kind, int> cases[] = {
      {Kind::done, 0}, {Kind::stopped, 75}, {Kind::settings, 2}, {Kind::gave_up, 1}};
  for (const auto& [kind, code] : cases) {
    Recovery recovery(options_of(2), {});
    const Verdict verdict = recovery.after({.kind = kind});
    EXPECT_FALSE(verdict.restarts);
    EXPECT_EQ(verdict.exit_code, code);
    EXPECT_EQ(recovery.memory().restarts, 0);
  }
}

// A GPU that is gone makes settings wrong that were right for weeks.
TEST(Recovery, SettingsThatHaveTrainedAreNotWrong) {
  Recovery recovery(options_of(2), {});
  AttemptEnd first = lost_at(100, 90);
  first.trained = true;
  ASSERT_TRUE(recovery.after(first).restarts);
  for (int i = 0; i < 2; ++i)
    EXPECT_TRUE(recovery.after({.kind = Kind::settings, .step = 90, .saved_step = 90}).restarts);
  const Verdict verdict = recovery.after({.kind = Kind::settings, .step = 90, .saved_step = 90});
  EXPECT_TRUE(verdict.crash_loop);
  EXPECT_EQ(verdict.exit_code, 1);
}

TEST(Recovery, RestartsAtOnceAndThenPausesLongerAndLonger) {
  Recovery::Options options = options_of(2);
  options.limits.set_max_restarts(100);
  Recovery recovery(options, {});
  std::vector<double> pauses;
  for (int64_t i = 0; i < 9; ++i) {
    const Verdict verdict = recovery.after(lost_at(100 + i, -1));
    ASSERT_TRUE(verdict.restarts) << verdict.text;
    pauses.push_back(verdict.pause);
  }
  EXPECT_EQ(pauses, (std::vector<double>{0, 1, 2, 4, 8, 16, 32, 60, 60}));
  EXPECT_EQ(recovery.memory().restarts, 9);
}

TEST(Recovery, ANewCheckpointIsProgress) {
  Recovery recovery(options_of(2), {});
  for (int64_t i = 0; i < 50; ++i) {
    const Verdict verdict = recovery.after(lost_at(10 * i + 5, 10 * i));
    ASSERT_TRUE(verdict.restarts) << i << ": " << verdict.text;
    EXPECT_EQ(verdict.pause, 0) << i;
  }
  EXPECT_EQ(recovery.memory().restarts, 50);
  // The same one, and one that is older, are none.
  EXPECT_EQ(recovery.after(lost_at(496, 490)).pause, 1);
  EXPECT_EQ(recovery.after(lost_at(497, 480)).pause, 2);
}

TEST(Recovery, GivesUpAfterSoManyRestartsWithoutACheckpoint) {
  for (int64_t most : {0, 1, 5}) {
    Recovery::Options options = options_of(2);
    options.limits.set_max_restarts(most);
    Recovery recovery(options, {});
    for (int64_t i = 0; i < most; ++i) EXPECT_TRUE(recovery.after(lost_at(100 + i, 40)).restarts);
    const Verdict verdict = recovery.after(lost_at(200, 40));
    EXPECT_FALSE(verdict.restarts);
    EXPECT_EQ(verdict.exit_code, 1);
    EXPECT_FALSE(verdict.crash_loop);
    EXPECT_NE(verdict.text.find("rank 1 has died"), std::string::npos) << verdict.text;
    EXPECT_NE(verdict.text.find("launch.max_restarts"), std::string::npos) << verdict.text;
  }
}

TEST(Recovery, RecognisesACrashLoopAtOneStep) {
  Recovery recovery(options_of(2), {});
  AttemptEnd failed = lost_at(57, 50);
  failed.kind = Kind::failed;
  EXPECT_TRUE(recovery.after(failed).restarts);
  EXPECT_TRUE(recovery.after(lost_at(53, 50)).restarts);  // another one in between
  EXPECT_TRUE(recovery.after(failed).restarts);
  const Verdict verdict = recovery.after(failed);
  EXPECT_FALSE(verdict.restarts);
  EXPECT_TRUE(verdict.crash_loop);
  EXPECT_EQ(verdict.exit_code, 1);
  EXPECT_NE(verdict.text.find("3 failures at step 58"), std::string::npos) << verdict.text;
}

// Steps of milliseconds are over before they are heard of.
TEST(Recovery, StepsThatMayBeOneAndTheSameCountTogether) {
  for (const auto& [unheard, loop] : {std::pair(0, false), {1, false}, {3, true}}) {
    Recovery recovery(options_of(2), {});
    Verdict verdict;
    for (int64_t step : {57, 54, 55}) {
      AttemptEnd end = lost_at(step, 50);
      end.steps_unheard = unheard;
      verdict = recovery.after(end);
    }
    EXPECT_EQ(verdict.crash_loop, loop) << unheard;
  }
}

TEST(Recovery, AStepThatWasPassedIsNoCrashLoop) {
  Recovery recovery(options_of(2), {});
  EXPECT_TRUE(recovery.after(lost_at(57, 50)).restarts);
  EXPECT_TRUE(recovery.after(lost_at(57, 50)).restarts);
  EXPECT_TRUE(recovery.after(lost_at(61, 60)).restarts);
  EXPECT_TRUE(recovery.after(lost_at(57, 50)).restarts);  // the newer checkpoint did not hold
  EXPECT_TRUE(recovery.memory().crashes.at(57) == 1);
}

TEST(Recovery, AttemptsThatNeverBeginAreACrashLoopToo) {
  Recovery recovery(options_of(2), {});
  const AttemptEnd end{.kind = Kind::not_begun, .step = 0, .text = "mpirun ended"};
  EXPECT_TRUE(recovery.after(end).restarts);
  EXPECT_TRUE(recovery.after(end).restarts);
  EXPECT_TRUE(recovery.after(end).crash_loop);
}

// A machine that starts again, a switch, a full disk.
TEST(Recovery, WaitsForMachinesOfARunThatHasTrained) {
  Recovery::Options options = options_of(4, 1, {{"a", 2}, {"b", 2}});
  options.limits.set_unreachable_seconds(300);
  Recovery recovery(options, {});
  AttemptEnd lost = lost_at(100, 90);
  lost.trained = true;
  const AttemptEnd end{.kind = Kind::not_begun, .saved_step = 90, .text = "mpirun ended"};
  for (int round = 0; round < 3; ++round) {
    lost.step = 100 + round;
    ASSERT_TRUE(recovery.after(lost).restarts);
    double pauses = 0;
    Verdict verdict;
    for (int i = 0; i < 8; ++i) {
      verdict = recovery.after(end);
      ASSERT_TRUE(verdict.restarts) << i << ": " << verdict.text;
      EXPECT_GE(verdict.pause, 1);
      pauses += verdict.pause;
    }
    EXPECT_EQ(pauses, 1 + 2 + 4 + 8 + 16 + 32 + 60 + 60);
  }
  Verdict verdict;
  for (int i = 0; i < 20 && (i == 0 || verdict.restarts); ++i) verdict = recovery.after(end);
  EXPECT_FALSE(verdict.restarts);
  EXPECT_FALSE(verdict.crash_loop);
  EXPECT_EQ(verdict.exit_code, 75);
  EXPECT_NE(verdict.text.find("launch.min_ranks"), std::string::npos) << verdict.text;
}

TEST(Recovery, LeavesOutAHostThatFailedTwice) {
  Recovery::Options options = options_of(4, 2, {{"a", 2}, {"b", 2}});
  options.limits.set_min_ranks(2);
  Recovery recovery(options, {});
  EXPECT_TRUE(recovery.after(lost_at(5, 0, {"b"})).left_out_now.empty());
  EXPECT_EQ(recovery.ranks(), 4);
  const Verdict verdict = recovery.after(lost_at(9, 0, {"b"}));
  EXPECT_TRUE(verdict.restarts);
  EXPECT_EQ(verdict.left_out_now, std::vector<std::string>{"b"});
  EXPECT_EQ(recovery.ranks(), 2);
  EXPECT_EQ(recovery.expert(), 2);
  ASSERT_EQ(recovery.hosts().size(), 1u);
  EXPECT_EQ(recovery.hosts()[0].name, "a");
  // The last one is never left out.
  EXPECT_TRUE(recovery.after(lost_at(10, 8, {"a"})).restarts);
  EXPECT_TRUE(recovery.after(lost_at(11, 8, {"a"})).left_out_now.empty());
  EXPECT_EQ(recovery.ranks(), 2);
}

TEST(Recovery, ForgetsTheFailuresOfAHostWithANewCheckpoint) {
  Recovery::Options options = options_of(4, 1, {{"a", 2}, {"b", 2}});
  options.limits.set_min_ranks(1);
  Recovery recovery(options, {});
  for (int64_t i = 0; i < 5; ++i)  // a month apart
    EXPECT_TRUE(recovery.after(lost_at(10 * i + 5, 10 * i, {"b"})).left_out_now.empty()) << i;
  EXPECT_EQ(recovery.after(lost_at(46, 40, {"b"})).left_out_now, std::vector<std::string>{"b"});
}

// A switch that starts again must not halve a run of a week.
TEST(Recovery, TriesAHostThatDoesNotAnswerAgain) {
  Recovery::Options options = options_of(3, 1, {{"a", 2}, {"b", 1}});
  options.limits.set_min_ranks(1);
  const std::vector<std::string> b{"b"};
  AttemptEnd silent = lost_at(5, 0, {"b"});
  silent.unreachable = {"b"};
  silent.trained = true;
  const AttemptEnd not_begun{.kind = Kind::not_begun, .saved_step = 0, .text = "no route to b"};
  for (const bool answers : {true, false}) {
    Recovery recovery(options, {});
    const Verdict first = recovery.after(silent);
    EXPECT_TRUE(first.left_out_now.empty());
    EXPECT_EQ(first.away_now, b);
    EXPECT_EQ(recovery.left_out(), b);
    EXPECT_EQ(recovery.ranks(), 2);
    // Another supervisor knows of it.
    const std::string text = memory_json(recovery.memory());
    RecoveryMemory memory;
    JsonReader json(text, "memory");
    read_memory(json, memory);
    EXPECT_EQ(Recovery(options, memory).ranks(), 2);
    // The next restart tries it, whatever it is for.
    EXPECT_TRUE(recovery.after(lost_at(7, 0, {"a"})).away_now.empty());
    EXPECT_EQ(recovery.ranks(), 3);
    if (answers) {
      EXPECT_TRUE(recovery.after(lost_at(9, 0)).away_now.empty());
      EXPECT_EQ(recovery.ranks(), 3);
    } else {
      EXPECT_EQ(recovery.after(not_begun).left_out_now, b);  // it has failed twice
      EXPECT_EQ(recovery.ranks(), 2);
      recovery.after(lost_at(9, 0));
      EXPECT_EQ(recovery.ranks(), 2);
    }
  }
}

TEST(Recovery, AnAttemptThatDoesNotBeginWithoutAHostEitherClearsIt) {
  Recovery::Options options = options_of(3, 1, {{"a", 2}, {"b", 1}});
  options.limits.set_min_ranks(1);
  options.here = "a";
  Recovery recovery(options, {});
  AttemptEnd silent = lost_at(5, 0, {"b"});
  silent.unreachable = {"b"};
  silent.trained = true;
  recovery.after(silent);
  const AttemptEnd full{.kind = Kind::not_begun, .saved_step = 0, .text = "no space left"};
  int without_b = 0;
  for (int i = 0; i < 6; ++i) {
    const Verdict verdict = recovery.after(full);
    EXPECT_TRUE(verdict.restarts && verdict.left_out_now.empty()) << i;
    EXPECT_EQ(verdict.away_now.empty(), recovery.ranks() == 3) << i;
    without_b += recovery.ranks() == 2;
  }
  EXPECT_EQ(without_b, 2);  // it has its turn now and then
}

// mpirun does not say which machine it could not reach, where none of its ranks had come yet.
TEST(Recovery, FindsTheHostWithoutWhichAttemptsBegin) {
  Recovery::Options options = options_of(4, 1, {{"a", 1}, {"b", 1}, {"c", 1}, {"d", 1}});
  options.limits.set_min_ranks(1);
  options.here = "a";
  Recovery recovery(options, {});
  AttemptEnd died = lost_at(5, 0, {"a"});  // mpirun had lost c, and so killed this one
  died.trained = true;
  recovery.after(died);
  const AttemptEnd not_begun{.kind = Kind::not_begun, .saved_step = 0, .text = "no route to host"};
  const auto needs_c = [&] {
    const auto hosts = recovery.hosts();
    return std::ranges::any_of(hosts, [](const HostSlots& host) { return host.name == "c"; });
  };
  int attempts = 0;
  for (; attempts < 20 && needs_c(); ++attempts) EXPECT_TRUE(recovery.after(not_begun).restarts);
  EXPECT_EQ(attempts, 3);
  EXPECT_EQ(recovery.ranks(), 3);
  recovery.after(lost_at(9, 0, {"b"}));
  EXPECT_EQ(recovery.ranks(), 4);
  EXPECT_EQ(recovery.after(not_begun).left_out_now, std::vector<std::string>{"c"});
}

// A machine that is shut down: its rank dies, its connection is closed, and no attempt begins.
TEST(Recovery, GoesOnWithoutAHostThatWentDown) {
  Recovery::Options options = options_of(3, 1, {{"a", 2}, {"b", 1}});
  options.limits.set_min_ranks(1);
  options.here = "a";
  const std::vector<std::string> b{"b"};
  const AttemptEnd not_begun{.kind = Kind::not_begun, .saved_step = 0, .text = "no route to b"};
  for (const bool it_was_b : {true, false}) {
    Recovery recovery(options, {});
    AttemptEnd died = lost_at(5, 0, b);
    died.trained = true;
    EXPECT_TRUE(recovery.after(died).away_now.empty());
    EXPECT_EQ(recovery.ranks(), 3);
    const std::string text = memory_json(recovery.memory());
    RecoveryMemory memory;
    JsonReader json(text, "memory");
    read_memory(json, memory);
    recovery = Recovery(options, memory);
    EXPECT_EQ(recovery.after(not_begun).away_now, b);
    EXPECT_EQ(recovery.ranks(), 2);
    for (int i = 0; i < 6 && !it_was_b; ++i)  // the disk is full
      EXPECT_TRUE(recovery.after(not_begun).left_out_now.empty()) << i;
    if (!it_was_b) continue;
    EXPECT_TRUE(recovery.after(lost_at(9, 0, {"a"})).left_out_now.empty());
    EXPECT_EQ(recovery.ranks(), 3);
    EXPECT_EQ(recovery.after(not_begun).left_out_now, b);
  }
}

TEST(Recovery, KnowsOfTheHostsOfItsListAlone) {
  RecoveryMemory memory;
  memory.left_out = {"b", "gone"};
  memory.away = {"gone too"};
  struct Case {
    std::vector<HostSlots> hosts;
    std::vector<std::string> left_out;
  };
  for (const auto& [hosts, left_out] : {Case{{{"a", 2}, {"b", 2}}, {"b"}},
                                        {{{"a", 2}, {"c", 2}}, {}},
                                        {{{"b", 2}}, {}},
                                        {{}, {}}}) {
    Recovery::Options options = options_of(2, 1, hosts);
    Recovery recovery(options, memory);
    EXPECT_EQ(recovery.left_out(), left_out);
    EXPECT_EQ(recovery.ranks(), 2);
  }
}

TEST(Recovery, GoesOnWithoutAHostWhoseProcessesDoNotDieOrLeavesTheRunToOthers) {
  for (int least : {1, 0}) {
    Recovery::Options options = options_of(3, 1, {{"a", 2}, {"b", 1}});
    options.limits.set_min_ranks(least);
    Recovery recovery(options, {});
    AttemptEnd end = lost_at(5, 0);
    end.stuck_host = "a";
    end.stuck = "moemamba (pid 12)";
    const Verdict verdict = recovery.after(end);
    EXPECT_EQ(verdict.restarts, least == 1);
    EXPECT_EQ(verdict.left_out_now, std::vector<std::string>(size_t(least), "a"));
    EXPECT_EQ(verdict.exit_code, least == 1 ? 0 : 75);
    EXPECT_EQ(verdict.text.find("moemamba (pid 12) on a") == std::string::npos, least == 1);
  }
}

TEST(Recovery, KeepsAHostWithoutWhichThereWouldBeTooFewRanks) {
  for (int least : {0, 3, 4}) {
    Recovery::Options options = options_of(4, 1, {{"a", 2}, {"b", 2}});
    options.limits.set_min_ranks(least);
    options.limits.set_host_failures(1);
    Recovery recovery(options, {});
    const Verdict verdict = recovery.after(lost_at(5, 0, {"b", "b"}));
    EXPECT_TRUE(verdict.restarts);
    EXPECT_TRUE(verdict.left_out_now.empty()) << least;
    EXPECT_EQ(recovery.ranks(), 4);
  }
}

TEST(Recovery, SpareSlotsTakeTheRanksOfAHostThatIsLeftOut) {
  Recovery::Options options = options_of(4, 2, {{"a", 2}, {"b", 2}, {"spare", 2}});
  options.limits.set_host_failures(1);
  Recovery recovery(options, {});
  EXPECT_EQ(recovery.after(lost_at(5, 0, {"a"})).left_out_now, std::vector<std::string>{"a"});
  EXPECT_EQ(recovery.ranks(), 4);
}

TEST(Recovery, FewerRanksAreWholeGroupsOfExperts) {
  struct Case {
    int ranks, expert, slots_left, ranks_then, expert_then;
  };
  // The last: not one group fits any more, so the groups become smaller.
  for (const Case& c :
       {Case{8, 4, 7, 4, 4}, {8, 2, 7, 6, 2}, {8, 1, 7, 7, 1}, {12, 6, 5, 3, 3}, {4, 4, 1, 1, 1}}) {
    Recovery::Options options =
        options_of(c.ranks, c.expert, {{"a", c.slots_left}, {"b", c.ranks - c.slots_left}});
    options.limits.set_min_ranks(1);
    options.limits.set_host_failures(1);
    Recovery recovery(options, {});
    recovery.after(lost_at(1, 0, {"b"}));
    EXPECT_EQ(recovery.ranks(), c.ranks_then) << c.slots_left << " slots";
    EXPECT_EQ(recovery.expert(), c.expert_then) << c.slots_left << " slots";
  }
}

TEST(Recovery, AnotherSupervisorRemembersAll) {
  Recovery::Options options = options_of(4, 1, {{"a", 2}, {"b\"\n", 2}});
  options.limits.set_min_ranks(1);
  options.limits.set_host_failures(1);
  Recovery first(options, {});
  AttemptEnd trained = lost_at(57, -1, {"b\"\n"});
  trained.trained = true;
  first.after(trained);
  first.after(lost_at(57, 50, {"a"}));
  first.after(lost_at(57, 50, {"a"}));
  RecoveryMemory memory;
  const std::string text = memory_json(first.memory());
  JsonReader json(text, "memory");
  read_memory(json, memory);
  json.end();
  EXPECT_EQ(memory_json(memory), text);
  EXPECT_EQ(memory.left_out, std::vector<std::string>{"b\"\n"});
  EXPECT_EQ(memory.best_saved, 50);
  EXPECT_TRUE(memory.trained);
  Recovery second(options, memory);
  EXPECT_EQ(second.ranks(), 2);
  EXPECT_TRUE(second.after(lost_at(57, 50)).crash_loop);
}

}  // namespace
}  // namespace moemamba
