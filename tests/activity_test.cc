// What a rank says that it is at, as the supervisor of its run hears it.
#include "core/activity.h"

#include <gtest/gtest.h>

#include <atomic>
#include <set>

#include "tests/support/exchange_scene.h"
#include "tests/support/in_world.h"
#include "tests/support/small_run.h"
#include "tests/support/temporary_folder.h"
#include "tests/support/training.h"
#include "tests/support/wires.h"
#include "tests/support/wrapped_files.h"

namespace moemamba {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

// Until `holds`, a minute at most.
template <class Condition>
bool soon(Condition holds) {
  for (const auto end = Clock::now() + std::chrono::minutes(1); Clock::now() < end;) {
    if (holds()) return true;
    std::this_thread::sleep_for(milliseconds(1));
  }
  return holds();
}

TEST(Activity, CountsCollectivesAndEveryChange) {
  Activity activity;
  const int expert = activity.add_group("expert"), data = activity.add_group("data");
  const uint64_t before = activity.now().progress;
  activity.begin_collective(data);
  EXPECT_TRUE(activity.now().in_collective);
  EXPECT_STREQ(activity.now().group, "data");
  activity.begin_collective(expert);
  EXPECT_STREQ(activity.now().group, "expert") << "added first: what the thread that trains is in";
  activity.begin_collective(data);
  activity.end_collective(data);
  EXPECT_STREQ(activity.now().group, "expert");
  activity.end_collective(expert);
  EXPECT_STREQ(activity.now().group, "data");
  EXPECT_TRUE(activity.now().in_collective);
  activity.end_collective(data);
  const Activity::Now now = activity.now();
  EXPECT_FALSE(now.in_collective);
  EXPECT_EQ(now.collective, 3);
  EXPECT_STREQ(now.group, "data") << "the latest";
  EXPECT_EQ(now.progress, before + 6);
}

TEST(Activity, KeepsNamesOfGroupsForItself) {
  Activity activity;
  EXPECT_STREQ(activity.now().group, "");
  std::string name = "expert";
  const int group = activity.add_group(name);
  activity.begin_collective(group);
  name = "gone";
  EXPECT_STREQ(activity.now().group, "expert");
  EXPECT_EQ(activity.add_group("expert"), group);
  activity.end_collective(group);
  activity.begin_collective(activity.add_group(std::string(100, 'x')));
  EXPECT_EQ(activity.now().group, std::string(23, 'x'));
  for (int i = 0; i < 20; ++i) activity.begin_collective(activity.add_group(std::to_string(i)));
  EXPECT_STREQ(activity.now().group, std::string(23, 'x').c_str());
}

TEST(Activity, IsInAPhaseForAScope) {
  Activity activity;
  activity.enter(Phase::forward);
  {
    const InPhase outer(&activity, Phase::evaluation);
    const InPhase inner(&activity, Phase::exchange);
    EXPECT_EQ(activity.phase(), Phase::exchange);
  }
  EXPECT_EQ(activity.phase(), Phase::forward);
  const InPhase nobody(nullptr, Phase::saving);
}

// A rank that stands still before its step: all others soon wait for it, and say where. (Before,
// weights of the last step may still be on their way.)
void expect_others_wait(int ranks, int expert, const char* group, std::set<Phase> phases) {
  std::vector<Activity> activities(static_cast<size_t>(ranks));
  std::atomic<bool> goes_on = false;
  TrainingHooks hooks;
  hooks.wire = [&](ProcessGroups& groups) { groups.tell(&activities[size_t(groups.rank)]); };
  const int last = ranks - 1;
  std::thread watcher([&] {
    std::vector<Activity::Now> now(static_cast<size_t>(ranks));
    const auto all_wait = [&] {
      for (int r = 0; r < ranks; ++r) now[size_t(r)] = activities[size_t(r)].now();
      bool wait = now[size_t(last)].step == 3 && !now[size_t(last)].in_collective;
      for (int r = 0; r < last; ++r)
        wait &= now[size_t(r)].step == 3 && now[size_t(r)].in_collective &&
                now[size_t(r)].collective > now[size_t(last)].collective &&
                std::string_view(now[size_t(r)].group) == group &&
                phases.contains(now[size_t(r)].phase);
      return wait;
    };
    EXPECT_TRUE(soon(all_wait)) << now[0].group << ", " << phase_name(now[0].phase);
    if (expert > 1) {
      EXPECT_EQ(now[0].layer, 0) << "the first block's experts";
    }
    goes_on = true;
  });
  std::vector<TrainerOptions> options(static_cast<size_t>(ranks), trainer_options(TrainingCase{}));
  for (TrainerOptions& each : options)
    each.before_step = [&, rank = &each - options.data()](int64_t step) {
      const bool stands = step == 3 && rank == last;
      EXPECT_TRUE(!stands || soon([&] { return goes_on.load(); }));
    };
  in_world(RankLayout(ranks, expert, 5), [&](ProcessGroups& groups) {
    hooks.wire(groups);
    Trainer trainer(groups, options[size_t(groups.rank)]);
    for (int64_t k = 0; k < 5; ++k) trainer.step(k);
  });
  watcher.join();
}

TEST(Activity, SaysWhereOthersWaitForARankOfTheirExperts) {
  expect_others_wait(3, 3, "expert", {Phase::exchange});
}

// Gradients travel beside the backward pass, whose first block is done while the last is made.
TEST(Activity, SaysWhereOthersWaitForARankOfTheirGradients) {
  expect_others_wait(2, 1, "data", {Phase::backward, Phase::reduction});
}

TEST(Activity, ExpectsTheRowsOfOtherRanks) {
  const ExchangeScene scene{
      .ranks = 2, .experts = 4, .capacity = 100, .width = 8, .rows = [](int rank, int) {
        return rank == 0 ? 3 : 5;
      }};
  std::vector<Activity> activities(2);
  std::atomic<int> looked = 0;
  in_world(RankLayout(2, 2, 4), [&](ProcessGroups& groups) {
    Activity& activity = activities[size_t(groups.rank)];
    // Two experts are the other rank's: 2 x 5 rows come to rank 0, and 2 x 3 come back to it.
    const int64_t there = groups.rank == 0 ? 10 : 6, back = 16 - there;
    groups.expert = std::make_unique<WatchedWire>(
        std::move(groups.expert), [&, there, back](CallKind kind, int64_t number) {
          const Activity::Now now = activity.now();
          if (kind == CallKind::all_gather) return;
          EXPECT_EQ(now.rows_expected, number % 2 == 0 ? there : back);
          EXPECT_EQ(now.rows_received, 0);
          EXPECT_EQ(now.phase, Phase::exchange);
          ++looked;
        });
    groups.tell(&activity);
    activity.enter(Phase::backward);
    Stream stream = Stream::immediate();
    there_and_back(scene, groups, stream);
    EXPECT_EQ(activity.now().rows_expected, -1);
    EXPECT_EQ(activity.phase(), Phase::backward);
  });
  EXPECT_GE(looked, 4);
}

// A watcher that looks again and again sees every phase in the end; the run goes on until then.
TEST(Activity, NamesAllPhasesOfARun) {
  TemporaryFolder folder;
  Activity activity;
  std::set<Phase> seen;
  std::atomic<bool> seen_all = false, ended = false;
  std::thread watcher([&] {
    while (!ended) {
      seen.insert(activity.phase());
      std::this_thread::yield();
      if (seen.contains(Phase::evaluation) && seen.contains(Phase::hashing) &&
          seen.contains(Phase::data) && seen.contains(Phase::forward) &&
          seen.contains(Phase::backward) && seen.contains(Phase::exchange) &&
          seen.contains(Phase::reduction) && seen.contains(Phase::optimizer) &&
          seen.contains(Phase::saving))
        seen_all = true;
    }
  });
  SmallRun run{.folder = folder / "run", .ranks = 2, .expert = 2, .steps = 1000000};
  run.save_interval = 5;
  run.asynchronous = false;
  run.train = "eval_interval: 1";
  const std::string data = concat("validation: \"", synthetic_tokens(61), "\"");
  run.data = data.c_str();
  run.wire = [&](ProcessGroups& groups) {
    if (groups.rank == 0) groups.tell(&activity);
  };
  const auto begun = Clock::now();
  std::atomic<bool> stops = false;
  run.before_step = [&](int rank, int64_t) {
    if (rank == 0) stops = seen_all || Clock::now() - begun > std::chrono::minutes(2);
  };
  run.stop_when = [&] { return stops.load(); };
  EXPECT_TRUE(launch(run).stopped);
  ended = true;
  watcher.join();
  EXPECT_TRUE(seen_all);
  EXPECT_EQ(activity.phase(), Phase::finishing);
}

TEST(Activity, IsLoadingWhileAStateIsRead) {
  TemporaryFolder folder;
  SmallRun run{.folder = folder / "run", .steps = 4, .launch_steps = 2};
  launch(run);
  Activity activity;
  bool loads = false, saves = false;
  WrappedFiles files;
  files.before_write = [&](const std::string& path) {
    if (path.find("step-00000004.tmp") != std::string::npos)
      saves |= activity.phase() == Phase::saving;
  };
  run.launch_steps = 0;
  run.asynchronous = false;
  run.files = &files;
  run.wire = [&](ProcessGroups& groups) {
    groups.control = std::make_unique<WatchedWire>(
        std::move(groups.control),
        [&](CallKind, int64_t) { loads |= activity.phase() == Phase::loading; });
    groups.tell(&activity);
  };
  launch(run);
  EXPECT_TRUE(loads);
  EXPECT_TRUE(saves);
}

TEST(Activity, KnowsHowLongARankHasWaitedForOthers) {
  std::vector<Activity> activities(2);
  std::vector<StepSeconds> seconds(2);
  TrainerOptions slow = trainer_options(TrainingCase{}), fast = slow;
  double computed = 0;
  slow.before_verdict = [&](int64_t, double of_step) {
    computed = of_step;
    std::this_thread::sleep_for(milliseconds(300));
  };
  in_world(RankLayout(2, 1, 5), [&](ProcessGroups& groups) {
    groups.tell(&activities[size_t(groups.rank)]);
    Trainer trainer(groups, groups.rank == 1 ? slow : fast);
    const StepRecord record = trainer.step(0);
    seconds[size_t(groups.rank)] = record.seconds;
    EXPECT_GT(record.rows, 0);
  });
  EXPECT_GE(seconds[0].waiting, 0.29) << "for the slow one";
  EXPECT_GE(seconds[1].all - seconds[1].waiting, 0.29) << "it has not waited but slept";
  EXPECT_GT(computed, 0);
  EXPECT_LE(computed, seconds[1].all - 0.29);
  for (const StepSeconds& of_rank : seconds) EXPECT_LE(of_rank.waiting, of_rank.all);
}

TEST(Activity, ChangesNoNumber) {
  TrainingHooks hooks;
  std::vector<Activity> activities(2);
  hooks.wire = [&](ProcessGroups& groups) { groups.tell(&activities[size_t(groups.rank)]); };
  const TrainingResult watched = train({}, 2, 2, hooks), alone = train({}, 2, 2);
  ASSERT_EQ(watched.records.size(), alone.records.size());
  for (size_t k = 0; k < alone.records.size(); ++k) {
    EXPECT_EQ(watched.records[k].loss, alone.records[k].loss);
    EXPECT_EQ(watched.records[k].grad_norm, alone.records[k].grad_norm);
  }
  EXPECT_GT(activities[0].now().collective, 0);
  EXPECT_EQ(activities[0].now().collective, activities[1].now().collective);
}

}  // namespace
}  // namespace moemamba
