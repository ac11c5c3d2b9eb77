// scripts/train.sbatch on a real slurmctld and slurmd (tests/slurm): time limits and preemptions
// cost a run nothing.
#include <nlohmann/json.hpp>

#include "core/file.h"
#include "tests/support/program.h"

namespace moemamba {
namespace {

constexpr int kCannotRun = 77;  // one_node.sh has said why; with CI=true it fails instead

class Slurm : public ProgramTest {
 protected:
  nlohmann::json newest_checkpoint(const std::string& run) const {
    const Result shown = shell("$moemamba inspect show " + run + " --json");
    EXPECT_EQ(shown.code, 0) << shown.err;
    return nlohmann::json::parse(shown.out);
  }
};

TEST_F(Slurm, AJobThatIsInterruptedComesBackUntilItsLastStep) {
  small_training(1);  // for its token files
  const Result result =
      shell("export MOEMAMBA=$moemamba; " MOEMAMBA_SOURCE_DIR
            "/tests/slurm/one_node.sh " MOEMAMBA_SOURCE_DIR
            "/tests/slurm/interruptions.sh " MOEMAMBA_SOURCE_DIR
            "/scripts/train.sbatch -- --model.width=64 --model.blocks=2 --model.experts=4 "
            "--train.sequence_length=64 --train.global_batch_size=8 --train.steps=2000 "
            "--train.save_interval=100 --data.train=tokens/train --parallel.expert=2");
  if (result.code == kCannotRun) GTEST_SKIP() << result.out;
  ASSERT_EQ(result.code, 0) << result.out << result.err;
  EXPECT_NE(result.out.find("job: COMPLETED after 3 restarts, exit code 0:0"), std::string::npos)
      << result.out << read_file(*this / "job.log");
  const std::string log = read_file(*this / "job.log");
  EXPECT_EQ(count(log, "resumed    "), 3) << log;
  EXPECT_EQ(count(log, "stopped    after step"), 3) << log;
  EXPECT_EQ(numbers_of(read_file(*this / "run/metrics.jsonl"), "loss").size(), 2000u);
  const auto interrupted = newest_checkpoint("run"), straight = newest_checkpoint("straight");
  EXPECT_EQ(interrupted.at("step"), 2000);
  EXPECT_EQ(interrupted.at("chain"), straight.at("chain"));
  EXPECT_EQ(interrupted.at("state_hash"), straight.at("state_hash"));
}

}  // namespace
}  // namespace moemamba
