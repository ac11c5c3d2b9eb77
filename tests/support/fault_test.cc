#include "tests/support/fault_test.h"

#include <filesystem>

#include "tests/support/small_run.h"

namespace moemamba {

std::string FaultTest::words(int64_t steps) const {
  return " --ranks 2 --launch.max_restarts=1000000 --launch.crash_loop=1000"
         " --launch.host_failures=1000 --launch.backoff_seconds=0.2"
         " --train.save_interval=20 --checkpoint.hash_interval=50 --train.progress=off"
         " --model.width=8" +
         small_training(steps);
}

FaultTest::Whole FaultTest::undisturbed(int64_t steps) const {
  const Result result = shell("$moemamba train" + words(steps));
  EXPECT_EQ(result.code, 0) << result.err;
  if (result.code != 0) return {};
  Whole whole{.steps = steps_of(run()), .end = newest_manifest(run())};
  EXPECT_EQ(int64_t(whole.steps.size()), steps);
  clear();
  return whole;
}

void FaultTest::expect_whole(const Launched& launched, const Whole& whole) const {
  const std::vector<std::string> steps = steps_of(launched.run());
  EXPECT_EQ(steps.size(), whole.steps.size());
  for (size_t i = 0; i < std::min(steps.size(), whole.steps.size()); ++i)
    if (steps[i] != whole.steps[i]) {
      EXPECT_EQ(steps[i], whole.steps[i]) << "line " << i << "; none before it differs";
      break;
    }
  const CheckpointManifest end = newest_manifest(launched.run());
  EXPECT_EQ(end.step(), whole.end.step());
  EXPECT_EQ(end.chain(), whole.end.chain());
  EXPECT_EQ(end.state_hash(), whole.end.state_hash());
  EXPECT_EQ(end.next_sample(), whole.end.next_sample());
  EXPECT_TRUE(file_exists(launched.run() + "/weights"));
  EXPECT_EQ(count(launched.said(), "damaged"), 0) << launched.said();
  expect_nothing_left(launched);
}

void FaultTest::expect_nothing_left(const Launched& launched) const {
  EXPECT_TRUE(wait_until([&] { return launched.processes_left().empty(); }, 15));
  for (pid_t id : launched.processes_left())
    ADD_FAILURE() << "still runs: " << id << " " << words_of(id, "cmdline");
}

void FaultTest::clear() const {
  std::filesystem::remove_all(run());
  std::filesystem::remove(*this / "said");
}

}  // namespace moemamba
