// Lost, hanging and slow ranks, in simulated time.
#include "launcher/supervisor/watch.h"

#include <gtest/gtest.h>

#include "core/error.h"

namespace moemamba {
namespace {

constexpr double kBeat = 0.25;  // between heartbeats and looks

WatchLimits limits() {
  return {.lost = 5, .hang = 10, .start = 300, .save = 600, .evaluation = 900};
}

// Ranks that train in simulated time: `now` goes on by beat().
class Scene {
 public:
  explicit Scene(int ranks, const WatchLimits& limits = moemamba::limits()) : watch(limits, ranks) {
    view.ranks = ranks;
    for (int r = 0; r < ranks; ++r)
      view.of_ranks.push_back({.rank = r,
                               .host = concat("node", r),
                               .pid = 100 + r,
                               .state = RankState::alive,
                               .activity = {.phase = Phase::forward, .collective = 40}});
  }
  RankView& rank(int r) { return view.of_ranks[size_t(r)]; }
  void progress(int r) {
    rank(r).progressed = now;
    ++rank(r).activity.progress;
  }
  void step(double seconds) {
    for (RankView& r : view.of_ranks) {
      ++r.step;
      r.activity.step = r.step + 1;
      r.step_seconds = r.busy_seconds = seconds;
    }
    for (RankView& r : view.of_ranks) watch.stepped(view, r.rank, r.step, 100);
  }
  // A quarter of a second in which all ranks are heard, but not `silent`.
  std::optional<Trouble> beat(int silent = -1) {
    now += kBeat;
    for (RankView& r : view.of_ranks)
      if (r.rank != silent && r.state != RankState::absent) r.heard = now;
    return watch.look(view, now);
  }
  // Beats until there is trouble; the seconds that took, or `most`.
  double until_trouble(double most, std::optional<Trouble>& trouble, int silent = -1) {
    const double begin = now;
    while (!trouble && now - begin < most) trouble = beat(silent);
    return now - begin;
  }

  RunView view;
  Watch watch;
  double now = 1000;
};

Scene training(int ranks, double step_seconds = 0.1) {
  Scene scene(ranks);
  for (int i = 0; i < 5; ++i) scene.step(step_seconds);
  for (int r = 0; r < ranks; ++r) {
    scene.rank(r).heard = scene.now;
    scene.progress(r);
  }
  return scene;
}

TEST(Watch, FindsASilentRankAfterItsTime) {
  Scene scene = training(3);
  std::optional<Trouble> trouble;
  for (int i = 0; i < 3; ++i) scene.progress(i);
  const double seconds = scene.until_trouble(60, trouble, /*silent=*/1);
  ASSERT_TRUE(trouble);
  EXPECT_EQ(trouble->kind, Trouble::Kind::silent);
  EXPECT_EQ(trouble->rank, 1);
  EXPECT_GT(seconds, 5);
  EXPECT_LE(seconds, 5 + 2 * kBeat);
  EXPECT_EQ(scene.rank(1).state, RankState::silent);
  EXPECT_EQ(scene.rank(0).state, RankState::alive);
  EXPECT_NE(trouble->text.find("rank 1 on node1 (process 101)"), std::string::npos)
      << trouble->text;
}

TEST(Watch, FindsAHangAfterItsTimeAndNamesWhoIsBehind) {
  Scene scene = training(4);
  for (int r = 0; r < 4; ++r) {
    scene.rank(r).activity.collective = r == 2 ? 40 : 41;
    scene.rank(r).activity.in_collective = r != 2;
    scene.rank(r).activity.phase = r == 2 ? Phase::backward : Phase::reduction;
  }
  std::optional<Trouble> trouble;
  const double seconds = scene.until_trouble(60, trouble);
  ASSERT_TRUE(trouble);
  EXPECT_EQ(trouble->kind, Trouble::Kind::hang);
  EXPECT_EQ(trouble->rank, 2);
  EXPECT_EQ(scene.rank(2).state, RankState::hanging);
  EXPECT_GT(seconds, 10);
  EXPECT_LE(seconds, 10 + 2 * kBeat);
  EXPECT_NE(trouble->text.find("backward"), std::string::npos) << trouble->text;
}

TEST(Watch, OfTheSameCollectiveTheOneThatHasLeftItIsBehind) {
  Scene scene = training(3);
  for (int r = 0; r < 3; ++r) scene.rank(r).activity.in_collective = r != 1;
  std::optional<Trouble> trouble;
  scene.until_trouble(60, trouble);
  ASSERT_TRUE(trouble);
  EXPECT_EQ(trouble->rank, 1);
}

TEST(Watch, NobodyIsBehindWhereAllAreInTheSameCollective) {
  Scene scene = training(3);
  for (int r = 0; r < 3; ++r) scene.rank(r).activity.in_collective = true;
  std::optional<Trouble> trouble;
  scene.until_trouble(60, trouble);
  ASSERT_TRUE(trouble);
  EXPECT_EQ(trouble->kind, Trouble::Kind::hang);
  EXPECT_EQ(trouble->rank, -1);
}

TEST(Watch, WhileOneRankMovesNoneHangs) {
  Scene scene = training(3);
  for (int i = 0; i < 4000; ++i) {
    scene.progress(i % 40 == 0 ? 1 : 2);
    ASSERT_FALSE(scene.beat()) << i;
  }
}

TEST(Watch, SlowStepsMayTakeFiveTimesTheSlowestOfTheLatestHundred) {
  Scene scene = training(2);
  scene.step(8);
  for (int i = 0; i < 98; ++i) scene.step(0.1);
  EXPECT_DOUBLE_EQ(scene.watch.limit_of(scene.rank(0)), 40);
  scene.step(0.1);
  EXPECT_DOUBLE_EQ(scene.watch.limit_of(scene.rank(0)), 40);
  scene.step(0.1);  // the slow one is the hundred and first now
  EXPECT_DOUBLE_EQ(scene.watch.limit_of(scene.rank(0)), 10);
}

// Reports of steps come between heartbeats, which alone know of phases.
TEST(Watch, ARankThatHasEndedAStepIsBeforeTheNextUntilItsHeartbeatSaysMore) {
  RankView rank{.activity = {.phase = Phase::backward, .step = 7, .layer = 2, .rows_expected = 9},
                .step = 7};
  EXPECT_EQ(activity_text(rank), "step 7, backward, layer 2, 0 of 9 rows");  // or after it: saving
  rank.reported = true;
  EXPECT_EQ(activity_text(rank), "step 8, data");
  rank.step = 6;  // the heartbeat knew of the next one already
  EXPECT_EQ(activity_text(rank), "step 7, backward, layer 2, 0 of 9 rows");
}

TEST(Watch, EveryPhaseHasItsLimit) {
  const std::pair<Phase, double> cases[] = {
      {Phase::starting, 300}, {Phase::loading, 300}, {Phase::data, 10},
      {Phase::forward, 10},   {Phase::exchange, 10}, {Phase::reduction, 10},
      {Phase::optimizer, 10}, {Phase::backward, 10}, {Phase::evaluation, 900},
      {Phase::saving, 600},   {Phase::hashing, 600}, {Phase::finishing, 600}};
  for (const auto& [phase, limit] : cases) {
    Scene scene = training(2);
    scene.rank(0).activity.phase = phase;  // the other one waits for it, in a step
    std::optional<Trouble> trouble;
    const double seconds = scene.until_trouble(2000, trouble);
    ASSERT_TRUE(trouble) << phase_name(phase);
    EXPECT_GT(seconds, limit) << phase_name(phase);
    EXPECT_LE(seconds, limit + 2 * kBeat) << phase_name(phase);
  }
}

TEST(Watch, TheFirstStepMayTakeAsLongAsTheStart) {
  Scene scene(2);
  for (int r = 0; r < 2; ++r) scene.rank(r).heard = scene.rank(r).progressed = scene.now;
  std::optional<Trouble> trouble;
  EXPECT_GT(scene.until_trouble(2000, trouble), 300);
  EXPECT_TRUE(trouble);
}

// Of an attempt that another supervisor has begun no step has been heard of yet.
TEST(Watch, FindsAHangOfAnAttemptThatWasTakenOver) {
  EXPECT_EQ(Watch(limits(), 2).step_limit(), 0);
  EXPECT_EQ(training(2).watch.step_limit(), 10);
  EXPECT_EQ(training(2, 30).watch.step_limit(), 150);
  for (const double limit : {10, 150}) {
    Scene scene(2);
    scene.watch.go_on(limit);
    EXPECT_EQ(scene.watch.step_limit(), limit);
    for (int r = 0; r < 2; ++r) scene.rank(r).heard = scene.rank(r).progressed = scene.now;
    std::optional<Trouble> trouble;
    const double seconds = scene.until_trouble(2000, trouble);
    EXPECT_GT(seconds, limit);
    EXPECT_LE(seconds, limit + 2 * kBeat);
    scene.step(0.1);  // what is heard from now on counts
    EXPECT_EQ(scene.watch.step_limit(), 10);
  }
}

TEST(Watch, ARankThatNeverComesIsNamed) {
  Scene scene(3);
  scene.view.started = scene.now;
  for (int r : {0, 1, 2}) scene.rank(r).progressed = scene.now;
  scene.rank(1).state = RankState::absent;
  std::optional<Trouble> trouble;
  const double seconds = scene.until_trouble(2000, trouble);
  ASSERT_TRUE(trouble);
  EXPECT_GT(seconds, 300);
  EXPECT_EQ(trouble->rank, 1);
  EXPECT_NE(trouble->text.find("rank 1 has not come"), std::string::npos) << trouble->text;
}

TEST(Watch, RanksThatHaveSaidGoodbyeAreNotMissed) {
  Scene scene = training(2);
  for (int r = 0; r < 2; ++r) scene.rank(r).state = RankState::ended;
  for (int i = 0; i < 400; ++i) {
    scene.now += kBeat;
    ASSERT_FALSE(scene.watch.look(scene.view, scene.now));
  }
}

// A suspended supervisor finds all ranks silent; their words lie in its sockets.
TEST(Watch, JudgesNobodyWhenItWasHeldUpItself) {
  Scene scene = training(2);
  EXPECT_FALSE(scene.beat());
  scene.now += 60;
  EXPECT_FALSE(scene.watch.look(scene.view, scene.now));
  EXPECT_EQ(scene.rank(0).state, RankState::alive);
  for (int r = 0; r < 2; ++r) scene.progress(r);
  for (int i = 0; i < 8; ++i) EXPECT_FALSE(scene.beat());
  // And it is watchful again afterwards.
  std::optional<Trouble> trouble;
  scene.until_trouble(60, trouble, /*silent=*/0);
  ASSERT_TRUE(trouble);
  EXPECT_EQ(trouble->rank, 0);
}

// Steps of 0.1 s with `tokens` each; rank 1 is slower by `factor`. Returns how often it was named.
int named(Scene& scene, int steps, double factor, int64_t tokens_of_slow = 100) {
  int count = 0;
  for (int i = 0; i < steps; ++i) {
    for (RankView& r : scene.view.of_ranks) {
      ++r.step;
      const int64_t tokens = r.rank == 1 ? tokens_of_slow : 100;
      r.busy_seconds = 0.001 * double(tokens) * (r.rank == 1 ? factor : 1);
      for (const auto& [rank, text] : scene.watch.stepped(scene.view, r.rank, r.step, tokens)) {
        EXPECT_EQ(rank, 1) << text;
        ++count;
      }
    }
  }
  return count;
}

TEST(Watch, ARankThatIsAFifthSlowerForFiftyStepsIsNamedOnce) {
  for (int ranks : {2, 3, 8}) {
    Scene scene(ranks);
    EXPECT_EQ(named(scene, 49, 1.25), 0) << ranks;
    EXPECT_EQ(named(scene, 1, 1.25), 1) << ranks;
    EXPECT_TRUE(scene.rank(1).straggler);
    EXPECT_EQ(named(scene, 500, 1.25), 0) << ranks;
    EXPECT_EQ(named(scene, 1, 1), 0);
    EXPECT_FALSE(scene.rank(1).straggler);
  }
}

TEST(Watch, SlowStepsInBetweenAreNoStraggler) {
  Scene scene(4);
  for (int i = 0; i < 20; ++i) {
    EXPECT_EQ(named(scene, 49, 3), 0);
    EXPECT_EQ(named(scene, 1, 1.1), 0);
  }
  EXPECT_EQ(named(scene, 1000, 1.19), 0);
}

TEST(Watch, TheSpeedOfARankIsPerToken) {
  Scene scene(4);
  EXPECT_EQ(named(scene, 200, 1, /*tokens_of_slow=*/700), 0);
  EXPECT_EQ(named(scene, 200, 1.5, /*tokens_of_slow=*/0), 0);  // it only serves its experts
}

// Reports that got lost with a connection hold up nothing.
TEST(Watch, AStepThatOneRankDoesNotReportIsPassedOver) {
  Scene scene(2);
  for (int i = 0; i < 5000; ++i) {
    scene.rank(0).busy_seconds = 0.1;
    EXPECT_TRUE(scene.watch.stepped(scene.view, 0, i, 100).empty());
  }
  scene.rank(0).step = scene.rank(1).step = 5000;
  EXPECT_EQ(named(scene, 50, 2), 1);
}

TEST(Watch, TheTableShowsAllRanksAndMarksTheCulprit) {
  Scene scene = training(3);
  scene.rank(2).gpu = "H100";
  scene.rank(2).group = "expert";
  scene.rank(2).activity.layer = 7;
  scene.rank(2).activity.in_collective = true;
  scene.rank(2).activity.rows_expected = 512;
  scene.rank(2).activity.rows_received = 120;
  scene.rank(2).state = RankState::hanging;
  scene.rank(0).state = RankState::absent;
  const std::string report = table_of(scene.view, 2, scene.now + 3);
  for (const char* part : {">2", "node2", "102", "H100", "hanging", "40 in", "expert", "120/512",
                           "3.0 s", "absent", "forward"})
    EXPECT_NE(report.find(part), std::string::npos) << part << "\n" << report;
  EXPECT_EQ(activity_text(scene.rank(2)),
            "step 5, forward, layer 7, in collective 40 (expert), 120 of 512 rows");
}

}  // namespace
}  // namespace moemamba
