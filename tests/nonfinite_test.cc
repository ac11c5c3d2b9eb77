// A step that is not finite is taken again, then from the newest checkpoint, then left out; and the
// run is the one that it would have been.
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <nlohmann/json.hpp>

#include "core/file.h"
#include "tests/support/in_world.h"
#include "tests/support/small_run.h"
#include "tests/support/temporary_folder.h"
#include "tests/support/training.h"
#include "tests/support/wires.h"
#include "tests/support/wrapped_files.h"

namespace moemamba {
namespace {

constexpr int64_t kAlways = 1'000'000;

// One rank's gradient becomes NaN in the first `times` attempts at a step.
struct Fault {
  int rank = 0;
  int64_t step = 5, times = 1;
  std::function<bool(int, int64_t)> spoil() const {
    return [*this, left = std::make_shared<std::atomic<int64_t>>(times)](int r, int64_t s) {
      return r == rank && s == step && (*left)-- > 0;
    };
  }
};

struct Told {
  std::vector<std::string> kinds, texts;
  std::vector<int64_t> steps;
  std::string text() const {
    std::string all;
    for (size_t i = 0; i < kinds.size(); ++i) all += kinds[i] + ": " + texts[i] + "\n";
    return all;
  }
};

// Saves and the like are told as well.
bool is_of_recovery(const RunEvent& event) {
  return event.kind() == "replayed" || event.kind() == "rolled_back" || event.kind() == "skipped";
}

// Its launch, and what it tells of its recovery on the way.
Told launch_and_listen(SmallRun run) {
  Told told;
  run.on_event = [&](const RunEvent& event) {
    if (!is_of_recovery(event)) return;
    told.kinds.push_back(event.kind());
    told.texts.push_back(event.text());
    told.steps.push_back(event.step());
  };
  launch(run);
  return told;
}

using Kinds = std::vector<std::string>;
const Kinds kReplayed = {"replayed"}, kRolledBack = {"replayed", "rolled_back"},
            kSkipped = {"replayed", "rolled_back", "skipped"},
            kSkippedAtOnce = {"replayed", "skipped"};

nlohmann::json line_of(const std::string& run, int64_t step) {
  return nlohmann::json::parse(steps_of(run).at(size_t(step)));
}

// The same steps, values and moments, but for what is said of attempts at them.
void expect_same_run(const std::string& a, const std::string& b, int64_t steps,
                     const std::string& where) {
  const auto lines = [](const std::string& run) {
    std::vector<std::string> rows;
    for (const std::string& line : steps_of(run)) {
      auto row = nlohmann::json::parse(line);
      row.erase("replays");
      rows.push_back(row.dump());
    }
    return rows;
  };
  EXPECT_EQ(int64_t(lines(b).size()), steps) << where;
  EXPECT_EQ(lines(a), lines(b)) << where;
  const CheckpointManifest one = newest_manifest(a), other = newest_manifest(b);
  EXPECT_EQ(one.step(), steps) << where;
  EXPECT_EQ(other.step(), steps) << where;
  EXPECT_EQ(one.chain(), other.chain()) << where;
  EXPECT_EQ(one.state_hash(), other.state_hash()) << where;
}

struct Case {
  const char* name;
  SmallRun run;
  int rank = 0;  // with the NaN
};

std::vector<Case> cases() {
  return {{"one rank", {.save_interval = 2}},
          {"saves that training waits for", {.save_interval = 1, .asynchronous = false}},
          {"rank 0 of 2", {.ranks = 2, .save_interval = 2}},
          {"rank 1 of 2", {.ranks = 2, .save_interval = 2}, 1},
          {"experts over both ranks", {.ranks = 2, .expert = 2, .save_interval = 3}, 1},
          {"micro-batches", {.ranks = 2, .batch = 12, .micro_batch = 2, .save_interval = 2}, 1},
          {"a rank without sequences", {.ranks = 3, .batch = 2, .save_interval = 4}, 0},
          {"router biases",
           {.ranks = 2, .save_interval = 2, .model = "router: SIGMOID router_bias_rate: 0.01"},
           1}};
}

void expect_mended(const Case& c, int64_t times, const Kinds& kinds) {
  TemporaryFolder folder;
  SmallRun run = c.run;
  run.folder = folder / "whole";
  launch(run);
  run.folder = folder / "spoilt";
  run.spoil = Fault{.rank = c.rank, .times = times}.spoil();
  const Told told = launch_and_listen(run);
  EXPECT_EQ(told.kinds, kinds) << c.name;
  EXPECT_NE(told.text().find(concat("not finite: gradient of rank ", c.rank, ";")),
            std::string::npos)
      << c.name << ": " << told.text();
  for (int64_t step : told.steps) EXPECT_EQ(step, 5) << c.name;
  expect_same_run(folder / "whole", run.folder, run.steps, c.name);
  EXPECT_EQ(line_of(run.folder, 5).at("replays"), times) << c.name;
  for (int64_t k : {4, 6}) EXPECT_FALSE(line_of(run.folder, k).contains("replays")) << c.name;
  EXPECT_FALSE(line_of(run.folder, 5).contains("skipped")) << c.name;
}

TEST(Nonfinite, OnceIsTakenAgainAndLeavesNoTrace) {
  for (const Case& c : cases()) expect_mended(c, 1, kReplayed);
}

TEST(Nonfinite, TwiceIsRolledBackAndLeavesNoTrace) {
  for (const Case& c : cases()) expect_mended(c, 2, kRolledBack);
}

TEST(Nonfinite, AtOneStepAlwaysIsLeftOutAndTheRunGoesOn) {
  for (const Case& c : cases()) {
    TemporaryFolder folder;
    SmallRun run = c.run;
    run.folder = folder / "run";
    run.spoil = Fault{.rank = c.rank, .times = kAlways}.spoil();
    EXPECT_EQ(launch_and_listen(run).kinds, kSkipped) << c.name;
    const auto before = line_of(run.folder, 4), at = line_of(run.folder, 5),
               after = line_of(run.folder, 6);
    EXPECT_EQ(at.at("skipped"), true) << c.name;
    EXPECT_EQ(at.at("replays"), 2) << c.name;
    EXPECT_TRUE(at.at("grad_norm").is_null()) << c.name;
    EXPECT_EQ(at.at("state_hash"), before.at("state_hash")) << c.name;
    // As docs/checkpoint_format.md has it.
    constexpr uint64_t kNone = 0x7ff8000000000000;
    const auto batch = uint64_t(c.run.batch);
    const uint64_t words[] = {5, kNone, kNone, 5 * batch, batch};
    EXPECT_EQ(at.at("chain"),
              sha256(before.at("chain").get<std::string>() +
                     std::string(reinterpret_cast<const char*>(words), sizeof words)))
        << c.name;
    EXPECT_NE(after.at("state_hash"), before.at("state_hash")) << c.name;
    EXPECT_TRUE(after.at("loss").is_number()) << c.name;
    EXPECT_EQ(steps_of(run.folder).size(), size_t(run.steps)) << c.name;
  }
}

// Ends after step 6, as asked; or amid step 7, so that the step that was left out is taken again.
TEST(Nonfinite, ARunThatWasKilledBehindAStepLeftOutIsTheOneThatWasNot) {
  for (const Case& c : cases()) {
    TemporaryFolder folder;
    SmallRun run = c.run;
    run.steps = 9;
    run.save_interval = 4;
    run.spoil = Fault{.rank = c.rank, .times = kAlways}.spoil();
    run.folder = folder / "whole";
    launch(run);
    // Steps 0 to 5 are asked for, 4 and 5 for a second time, then 6.
    for (const bool crashes : {false, true}) {
      run.folder = folder / (crashes ? "crashed" : "stopped");
      SmallRun part = run;
      (crashes ? part.crash_at : part.launch_steps) = 9;
      if (crashes)
        EXPECT_NE(message_of([&] { launch(part); }).find("as the test wants"), std::string::npos);
      else
        EXPECT_TRUE(launch(part).stopped) << c.name;
      EXPECT_EQ(newest_manifest(run.folder).step(), crashes ? 4 : 7) << c.name;
      EXPECT_EQ(launch_and_listen(run).kinds, crashes ? kSkipped : Kinds()) << c.name;
      expect_same_run(folder / "whole", run.folder, run.steps, c.name);
    }
  }
}

TEST(Nonfinite, BeforeTheFirstCheckpointAStepIsTakenAgainThenLeftOut) {
  TemporaryFolder folder;
  const SmallRun run{.folder = folder / "run",
                     .ranks = 2,
                     .spoil = Fault{.rank = 1, .step = 0, .times = kAlways}.spoil()};
  EXPECT_EQ(launch_and_listen(run).kinds, kSkippedAtOnce);
  EXPECT_EQ(line_of(run.folder, 0).at("skipped"), true);
  EXPECT_EQ(line_of(run.folder, 0).at("replays"), 1);
  EXPECT_EQ(newest_manifest(run.folder).step(), run.steps);
}

// The save of steps 0 to 4 is held up until step 5 has been taken a second time.
TEST(Nonfinite, ARollBackWaitsForTheSaveThatIsOnItsWay) {
  for (int ranks : {1, 2}) {
    TemporaryFolder folder;
    SmallRun run{.folder = folder / "whole", .ranks = ranks, .save_interval = 5};
    launch(run);
    run.folder = folder / "spoilt";
    run.spoil = Fault{.rank = ranks - 1, .times = 2}.spoil();
    Milestone replayed;
    WrappedFiles disk;
    std::atomic<bool> held = false;
    disk.before_write = [&](const std::string& path) {
      if (path.find("step-00000005") == std::string::npos) return;
      held = true;
      EXPECT_TRUE(replayed.wait());
    };
    run.files = &disk;
    Kinds kinds;
    std::string text;
    run.on_event = [&](const RunEvent& event) {
      if (!is_of_recovery(event)) return;
      if (event.kind() == "replayed") replayed.reach();
      kinds.push_back(event.kind());
      text = event.text();
    };
    launch(run);
    EXPECT_TRUE(held);
    EXPECT_EQ(kinds, kRolledBack);
    EXPECT_NE(text.find("checkpoint after step 5"), std::string::npos) << text;
    expect_same_run(folder / "whole", run.folder, run.steps, concat(ranks, " ranks"));
  }
}

TEST(Nonfinite, TenStepsInARowEndTheRun) {
  for (const int64_t save_interval : {0, 4}) {
    TemporaryFolder folder;
    SmallRun run{.folder = folder / "run", .ranks = 2, .steps = 40};
    run.save_interval = save_interval;
    const int64_t first = save_interval == 0 ? 0 : 6;
    run.spoil = [first](int rank, int64_t step) { return rank == 1 && step >= first; };
    Kinds kinds;
    run.on_event = [&](const RunEvent& event) {
      if (is_of_recovery(event)) kinds.push_back(event.kind());
    };
    const std::string said = message_of([&] { launch(run); });
    EXPECT_NE(said.find(concat("steps ", first + 1, " to ", first + 10,
                               ": loss or gradient is not finite (in the last one: gradient of "
                               "rank 1)")),
              std::string::npos)
        << said;
    EXPECT_EQ(std::ranges::count(kinds, "replayed"), 10);
    EXPECT_EQ(std::ranges::count(kinds, "skipped"), 9);
    EXPECT_EQ(std::ranges::count(kinds, "rolled_back"), save_interval == 0 ? 0 : 1);
    const auto places = list_checkpoints(run.folder);
    ASSERT_EQ(places.size(), save_interval == 0 ? 0u : 1u);
    if (save_interval > 0) {
      EXPECT_EQ(places[0].step, 4) << "one from before";
    }
  }
}

// Every second step, and nothing is saved between them.
TEST(Nonfinite, OneCheckpointIsGoneBackToThreeTimesAtMost) {
  TemporaryFolder folder;
  SmallRun run{.folder = folder / "run", .ranks = 2, .steps = 16};
  SmallRun begin = run;
  begin.launch_steps = 4;
  EXPECT_TRUE(launch(begin).stopped);
  run.spoil = [](int rank, int64_t step) { return rank == 0 && step % 2 == 1; };
  run.train = "progress: ON";
  testing::internal::CaptureStderr();
  const Told told = launch_and_listen(run);
  const std::string said = testing::internal::GetCapturedStderr();
  EXPECT_NE(said.find("  SKIPPED 6x"), std::string::npos) << said;
  EXPECT_EQ(said.find("  SKIPPED 7x"), std::string::npos) << "counted twice";
  EXPECT_EQ(std::ranges::count(told.kinds, "rolled_back"), 3);
  EXPECT_EQ(newest_manifest(run.folder).step(), run.steps);
  for (int64_t k = 4; k < run.steps; ++k)
    EXPECT_EQ(line_of(run.folder, k).contains("skipped"), k % 2 == 1) << k;
}

TEST(Nonfinite, TheRunEndsWhereItIsToStopAndNothingIsLost) {
  TemporaryFolder folder;
  SmallRun run{.folder = folder / "whole", .ranks = 2, .save_interval = 2};
  launch(run);
  run.folder = folder / "spoilt";
  run.train = "on_nonfinite: STOP";
  SmallRun spoilt = run;
  spoilt.spoil = Fault{.rank = 1, .times = kAlways}.spoil();
  Kinds kinds;
  spoilt.on_event = [&](const RunEvent& event) {
    if (is_of_recovery(event)) kinds.push_back(event.kind());
  };
  const std::string said = message_of([&] { launch(spoilt); });
  for (const char* part : {"step 6 (samples 20 to 23)", "gradient of rank 1",
                           "also when taken again and on the way from the newest checkpoint",
                           "--train.on_nonfinite=SKIP"})
    EXPECT_NE(said.find(part), std::string::npos) << said;
  EXPECT_EQ(kinds, kRolledBack);
  EXPECT_EQ(newest_manifest(run.folder).step(), 4);
  launch(run);
  expect_same_run(folder / "whole", run.folder, run.steps, "stopped, then without the fault");
}

// A signal comes in the step that is not finite twice: there may be no time to load anything.
TEST(Nonfinite, ARunThatIsAskedToStopMeanwhileEndsBeforeTheStep) {
  for (const int64_t save_interval : {2, 5}) {  // the state before step 5 is not saved yet, or is
    TemporaryFolder folder;
    SmallRun run{.folder = folder / "whole", .ranks = 2};
    run.save_interval = save_interval;
    launch(run);
    run.folder = folder / "stopped";
    SmallRun part = run;
    part.launch_steps = 6;
    part.stop_rank = 1;
    part.spoil = Fault{.times = 2}.spoil();
    Kinds kinds;
    part.on_event = [&](const RunEvent& event) {
      if (is_of_recovery(event)) kinds.push_back(event.kind());
    };
    EXPECT_TRUE(launch(part).stopped);
    EXPECT_EQ(kinds, kReplayed);
    EXPECT_EQ(newest_manifest(run.folder).step(), 5);
    EXPECT_EQ(steps_of(run.folder).size(), 5u);
    EXPECT_FALSE(launch(run).stopped);
    expect_same_run(folder / "whole", run.folder, run.steps, "stopped amid trouble");
  }
}

// Writes NaN over a part of the weights ahead of, or behind, the n-th gathering of them.
class DamagingWire final : public Wire {
 public:
  DamagingWire(std::unique_ptr<Communicator> inner, int64_t call, bool own)
      : Wire(std::move(inner)), call_(call), own_(own) {}
  void all_gather(Stream& stream, const void* send, void* recv, int64_t bytes) override {
    const bool now = calls_++ == call_;
    const auto damage = [&](int of_rank) {
      char* at = static_cast<char*>(recv) + of_rank * bytes;
      stream.submit([at, bytes] {
        std::fill_n(reinterpret_cast<float*>(at), bytes / int64_t(sizeof(float)), NAN);
      });
    };
    if (now && own_) damage(rank());
    Wire::all_gather(stream, send, recv, bytes);
    if (now && !own_) damage(1 - rank());
  }

 private:
  int64_t call_, calls_ = 0;
  bool own_;
};

// NaN in the weights makes logits and losses NaN. What a rank has of another one's is right again
// when it is gathered again; what it has of its own is lost, and comes from the checkpoint.
TEST(Nonfinite, DamagedWeightsAreMended) {
  TemporaryFolder folder;
  SmallRun run{.folder = folder / "whole", .ranks = 2, .save_interval = 2};
  launch(run);
  for (const bool own : {false, true}) {
    run.folder = folder / (own ? "own" : "copy");
    run.wire = [own](ProcessGroups& groups) {
      if (groups.rank != 1) return;
      constexpr int64_t kBuckets = 3, kStep = 4;  // embedding, block, head
      groups.data =
          std::make_unique<DamagingWire>(std::move(groups.data), kStep * kBuckets + 1, own);
    };
    const Told told = launch_and_listen(run);
    EXPECT_EQ(told.kinds, own ? kRolledBack : kReplayed);
    EXPECT_EQ(told.steps[0], 5);
    EXPECT_NE(told.texts[0].find(own ? "not finite: router logits of ranks 0, 1"
                                     : "not finite: router logits of rank 1"),
              std::string::npos)
        << told.texts[0];
    expect_same_run(folder / "whole", run.folder, run.steps, own ? "own" : "copy");
  }
}

// Without routers it is the loss that tells.
TEST(Nonfinite, ARankWhoseLossIsNotFiniteIsNamed) {
  const TrainingCase c{.experts = 0, .batch = 6, .steps = 1};
  const TrainerOptions options = trainer_options(c);
  in_world(RankLayout(3, 1, 0), [&](ProcessGroups& groups) {
    Trainer trainer(groups, options);
    const Parameter& head = trainer.session().store.parameters().back();
    if (groups.rank == 2) head.value.row<float>(0)[0] = NAN;
    trainer.step(0);
    EXPECT_TRUE(trainer.skipped());
    EXPECT_EQ(trainer.blame(), "loss of rank 2");
  });
}

TEST(Nonfinite, EveryRankWithANanInItsGradientIsNamed) {
  const TrainingCase c{.experts = 5, .batch = 6, .micro_batch = 1, .steps = 1};
  for (const auto& [bad, text] : {std::pair(std::vector<int>{0}, "gradient of rank 0"),
                                  {std::vector<int>{2}, "gradient of rank 2"},
                                  {std::vector<int>{1, 2}, "gradient of ranks 1, 2"}})
    in_world(RankLayout(3, 3, 5), [&, bad = bad, text = text](ProcessGroups& groups) {
      TrainerOptions options = trainer_options(c);
      options.spoil = [&](int64_t) { return std::ranges::count(bad, groups.rank) > 0; };
      Trainer trainer(groups, options);
      trainer.step(0);
      EXPECT_TRUE(trainer.skipped());
      EXPECT_EQ(trainer.blame(), text);
    });
}

}  // namespace
}  // namespace moemamba
