// What a training run does for the supervisor above it: writes under its lease, tells it of steps
// and events.
#include <gtest/gtest.h>

#include <filesystem>
#include <mutex>

#include "runtime/checkpoint_folder.h"
#include "runtime/lease.h"
#include "tests/support/small_run.h"
#include "tests/support/temporary_folder.h"
#include "tests/support/training.h"

namespace moemamba {
namespace {

using std::chrono::milliseconds;

struct Heard {
  std::vector<std::string> kinds;
  std::vector<RunEvent> events;
  std::vector<std::vector<StepRecord>> steps;  // of each rank
};

Heard launch_and_hear(SmallRun run) {
  Heard heard;
  heard.steps.resize(size_t(run.ranks));
  run.on_event = [&](const RunEvent& event) {
    heard.kinds.push_back(event.kind());
    heard.events.push_back(event);
  };
  const auto change = run.change;
  run.change = [&](int rank, TrainRequest& request) {
    if (change) change(rank, request);
    request.on_step = [&, rank](const StepRecord& record, const std::vector<double>& choices) {
      EXPECT_FALSE(choices.empty());
      heard.steps[size_t(rank)].push_back(record);
    };
  };
  launch(run);
  return heard;
}

TEST(SupervisedRun, TellsOfItsSavesAndEvaluationsAndItsEnd) {
  TemporaryFolder folder;
  SmallRun run{.folder = folder / "run", .ranks = 2, .expert = 2, .steps = 6};
  run.save_interval = 2;
  run.asynchronous = false;
  run.train = "eval_interval: 3";
  const std::string data = concat("validation: \"", synthetic_tokens(61), "\"");
  run.data = data.c_str();
  run.launch_steps = 4;
  const Heard first = launch_and_hear(run);
  EXPECT_EQ(first.kinds, (std::vector<std::string>{"saved", "evaluated", "stopping", "saved"}));
  EXPECT_EQ(first.events[0].step(), 2);
  EXPECT_GT(first.events[0].seconds(), 0);
  EXPECT_EQ(first.events[1].step(), 2) << "the step after which it was, from 0";
  EXPECT_NE(first.events[1].text().find("held-out loss"), std::string::npos);
  EXPECT_EQ(first.events[2].step(), 3);
  run.launch_steps = 0;
  const Heard second = launch_and_hear(run);
  EXPECT_EQ(second.kinds, (std::vector<std::string>{"resumed", "evaluated", "saved"}));
  EXPECT_EQ(second.events[0].step(), 4);
  EXPECT_EQ(second.events[2].step(), 6);
}

TEST(SupervisedRun, ReportsEveryStepOfEveryRank) {
  TemporaryFolder folder;
  const Heard heard =
      launch_and_hear({.folder = folder / "run", .ranks = 2, .expert = 2, .steps = 5});
  int64_t rows = 0;
  for (const auto& steps : heard.steps) {
    ASSERT_EQ(steps.size(), 5u);
    for (int64_t k = 0; k < 5; ++k) {
      EXPECT_EQ(steps[size_t(k)].step, k);
      EXPECT_GT(steps[size_t(k)].seconds.all, 0);
    }
    rows += steps[0].rows;
  }
  // One layer of experts: 4 sequences of 16 tokens, one choice each.
  EXPECT_EQ(rows, 64);
}

std::vector<std::string> leases_of(const std::string& run) {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(run + "/lease"))
    names.push_back(entry.path().filename().string());
  return names;
}

TEST(SupervisedRun, WritesUnderTheLeaseOfAnother) {
  TemporaryFolder folder;
  PosixFileSystem files;
  const std::string where = folder / "run";
  const Lease supervisor(files, where, {.lifetime = milliseconds(10000)});
  const auto before = leases_of(where);
  SmallRun run{.folder = where, .ranks = 2, .expert = 2, .steps = 4};
  run.change = [&](int, TrainRequest& request) {
    request.lease_generation = [&] { return supervisor.generation(); };
  };
  EXPECT_EQ(launch_and_hear(run).kinds, std::vector<std::string>{"saved"});
  EXPECT_EQ(leases_of(where), before) << "it takes none of its own";
  EXPECT_TRUE(supervisor.ours()) << "and releases none";
  EXPECT_EQ(newest_manifest(where).step(), 4);
}

TEST(SupervisedRun, WritesNothingOnceTheLeaseIsNewerThanWhatItWasTold) {
  TemporaryFolder folder;
  PosixFileSystem files;
  const std::string where = folder / "run";
  const Lease supervisor(files, where, {.lifetime = milliseconds(10000)});
  SmallRun run{.folder = where, .ranks = 2, .expert = 2, .steps = 4, .asynchronous = false};
  run.save_interval = 1;
  std::atomic<int64_t> told = supervisor.generation();
  run.change = [&](int, TrainRequest& request) {
    request.lease_generation = [&] { return told.load(); };
  };
  run.before_step = [&](int rank, int64_t step) {
    if (rank == 0 && step == 1) --told;  // as if a successor had come
    if (rank == 0 && step == 2) ++told;  // and this rank had heard of it
  };
  const Heard heard = launch_and_hear(run);
  EXPECT_EQ(heard.kinds, (std::vector<std::string>{"saved", "save_failed", "saved", "saved"}));
  EXPECT_EQ(heard.events[1].step(), 2);
  EXPECT_NE(heard.events[1].text().find("taken over"), std::string::npos) << heard.events[1].text();
}

}  // namespace
}  // namespace moemamba
