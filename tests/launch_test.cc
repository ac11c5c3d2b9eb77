// The program across ranks: mpirun, agreement, layouts, signals, dead ranks.
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <thread>
#include <tuple>

#include "core/file.h"
#include "runtime/checkpoint_folder.h"
#include "tests/support/program.h"
#include "tests/support/training.h"

namespace moemamba {
namespace {

class Launch : public ProgramTest {
 protected:
  // The program that is running says that it has got a signal.
  bool asked() const {
    return count(read_file(*this / "shell.err"), "moemamba: ending after this step") > 0;
  }
};

TEST_F(Launch, TrainsUnderMpirunAndHandsOnTheExitCode) {
  const std::string words = small_training(2);
  Result result = shell("$moemamba train --ranks 2 --parallel.expert 2" + words);
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(numbers_of(read_file(run() + "/metrics.jsonl"), "loss").size(), 2u);
  result = shell("$moemamba train --ranks 2" + words);  // the folder holds a run
  EXPECT_EQ(result.code, 1) << result.err;
  EXPECT_EQ(
      count(result.err, "moemamba: " + run() +
                            " already holds a run; choose another --run or set --overwrite=true to "
                            "replace it; it is finished: step 2 of 2"),
      1)
      << result.err;
  result = shell("$mpirun -n 2 $moemamba train --overwrite=true" + words);
  EXPECT_EQ(result.code, 0) << result.err;
  result = shell("$mpirun -n 2 $moemamba train --ranks 3" + words);
  EXPECT_EQ(result.code, 2) << result.err;
  EXPECT_NE(result.err.find("mpirun has already started 2 ranks"), std::string::npos);
}

TEST_F(Launch, RanksWithOtherSettingsRefuseToStart) {
  const std::string words = small_training(2);
  const Result result = shell("$mpirun -n 1 $moemamba train " + words + " : -n 1 $moemamba train " +
                              words + " --train.lr=0.5");
  EXPECT_EQ(result.code, 1) << result.err;
  EXPECT_NE(result.err.find("train.lr: rank 0 \"0.001\", rank 1 \"0.5\""), std::string::npos)
      << result.err;
  EXPECT_FALSE(file_exists(run()));
}

// A machine that was left with an older build of the same version.
TEST_F(Launch, RanksOfOtherSourcesRefuseToStart) {
  const std::string version = shell("$moemamba --version").out;
  const std::string mark = "sources: ";
  const std::string own = version.substr(version.find(mark) + mark.size(), 16);
  std::string program = read_file(MOEMAMBA_BINARY_DIR "/moemamba");
  ASSERT_EQ(count(program, own), 1);
  program.replace(program.find(own), own.size(), "0123456789abcdef");
  put("older", program);
  std::filesystem::permissions(*this / "older", std::filesystem::perms::owner_all);
  const std::string words = " train --parallel.expert=2" + small_training(2);
  const Result result = shell("$mpirun -n 1 $moemamba" + words + " : -n 1 ./older" + words);
  EXPECT_EQ(result.code, 1) << result.err;
  EXPECT_EQ(count(result.err, "build sources: rank 0 \"" + own + "\", rank 1 \"0123456789abcdef\""),
            1)
      << result.err;
  EXPECT_EQ(count(result.err, "build version"), 0) << result.err;
  EXPECT_FALSE(file_exists(run()));
}

// As tasks of srun without PMIx are: each would train alone, all into one folder.
TEST_F(Launch, RanksThatDoNotFindEachOtherRefuseToStart) {
  const Result result =
      shell("PMI_RANK=0 PMI_SIZE=2 $moemamba train --parallel.expert=2" + small_training(2));
  EXPECT_EQ(result.code, 1) << result.err;
  EXPECT_EQ(count(result.err, "2 ranks were started, but MPI knows of 1"), 1) << result.err;
  EXPECT_FALSE(file_exists(run()));
}

// Experts over four, two and one of four ranks, and one rank alone: the same model, the same text.
TEST_F(Launch, EveryLayoutWritesTheSameLosses) {
  const std::string words = small_training(6) +
                            "--model.blocks=2 --model.experts=42 --model.top_k=2 "
                            "--train.global_batch_size=13 --train.lr=0.01 "
                            "--data.validation=tokens/validation --train.progress=off ";
  const auto metrics = [&](const std::string& program, const std::string& expert) {
    const Result result =
        shell(program + " train --overwrite=true --parallel.expert=" + expert + words);
    EXPECT_EQ(result.code, 0) << program << "\n" << result.err;
    return read_file(run() + "/metrics.jsonl");
  };
  const std::string alone = metrics("$moemamba", "1");
  EXPECT_EQ(numbers_of(alone, "loss").size(), 6u);
  EXPECT_EQ(numbers_of(alone, "val_bpb").size(), 1u);
  double worst = 0;
  for (const char* expert : {"4", "2", "1"}) {
    const std::string shared = metrics("$mpirun -n 4 $moemamba", expert);
    for (const char* field : {"loss", "ce", "balance_loss", "val_loss", "val_bpb"}) {
      const std::vector<double> one = numbers_of(alone, field), four = numbers_of(shared, field);
      ASSERT_EQ(one.size(), four.size()) << field;
      for (size_t i = 0; i < one.size(); ++i) {
        const double difference = std::abs(four[i] / one[i] - 1);
        worst = std::max(worst, difference);
        EXPECT_LE(difference, kLossBound)
            << field << " " << i << ", experts over " << expert << " of four ranks";
      }
    }
  }
  std::printf("worst relative difference %.2g, bound %.2g\n", worst, kLossBound);
}

// A prompt that looks like an option reaches the ranks as it is.
TEST_F(Launch, GeneratesTheSameTextOnAnyNumberOfRanks) {
  ASSERT_EQ(shell("$moemamba train" + small_training(2)).code, 0);
  for (const std::string prompt : {"--ranks", "--ranks=3", "The 7th"}) {
    const std::string words = " --run run --prompt '" + prompt + "' --tokens 40 --seed 5";
    const Result alone = shell("$moemamba generate" + words);
    EXPECT_EQ(alone.code, 0) << alone.err;
    EXPECT_EQ(alone.out.substr(0, prompt.size()), prompt);
    EXPECT_EQ(alone.out.back(), '\n');
    EXPECT_GT(alone.out.size(), prompt.size() + 1);
    const Result shared = shell("$moemamba generate --ranks 2" + words);
    EXPECT_EQ(shared.code, 0) << shared.err;
    EXPECT_EQ(shared.out, alone.out);
  }
}

TEST_F(Launch, ZeroStepsWriteTheFirstWeights) {
  const Result result = shell("$moemamba train --ranks 2 --parallel.expert=2" + small_training(0));
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(read_file(run() + "/metrics.jsonl"), "");
  const Result evaluated =
      shell("$moemamba evaluate --run run --data.validation=tokens/validation");
  EXPECT_EQ(evaluated.code, 0) << evaluated.err;
  EXPECT_EQ(count(evaluated.out, ", loss 5.5"), 1) << evaluated.out;  // log 257: knows nothing
}

TEST_F(Launch, TheProgressLineKnowsBitsPerByteWithoutHeldOutTextToo) {
  for (const char* more : {"", "--data.validation=tokens/validation "}) {
    const Result result = shell("$moemamba train --overwrite=true" + small_training(1) + more);
    EXPECT_EQ(result.code, 0) << result.err;
    EXPECT_EQ(count(result.err, " (bpb 8.0"), 1) << result.err;
  }
}

TEST_F(Launch, RanksWithoutSequencesAreTold) {
  const std::string train = "$moemamba train --ranks 3 --overwrite=true" + small_training(1);
  Result result = shell(train + "--train.routing_group=4");
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(count(result.err,
                  "moemamba: 2 of 3 ranks have no sequences: train.global_batch_size 4 is 1 x "
                  "train.routing_group 4, and a group stays on one rank; set "
                  "train.global_batch_size to 12 or lower train.routing_group\n"),
            1)
      << result.err;
  result = shell(train + "--train.progress=off");
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(result.err, "");
}

TEST_F(Launch, ADeadRankEndsTheOthersAndIsNamed) {
  for (size_t dead : {0, 1}) {
    const Result result = while_training(
        "--train.progress=off --overwrite=true",
        [dead](const Processes& processes) { kill(processes.ranks[dead], SIGKILL); });
    EXPECT_EQ(result.code, 75) << result.err;
    EXPECT_EQ(count(result.err, "process rank " + std::to_string(dead) + " with PID "), 1)
        << result.err;
    EXPECT_EQ(count(result.err, "process rank "), 1) << result.err;
    EXPECT_EQ(count(result.err, "a rank was lost (signal 9: Killed)"), 1) << result.err;
    EXPECT_FALSE(file_exists(run() + "/weights"));
    std::filesystem::remove_all(run());
  }
}

void expect_whole(const std::string& metrics) {
  ASSERT_FALSE(metrics.empty());
  EXPECT_EQ(metrics.back(), '\n');
  EXPECT_EQ(count(metrics, "{\"step\":"), count(metrics, "\"}\n"));
  EXPECT_EQ(count(metrics, "{\"step\":"), count(metrics, "\n"));
}

TEST_F(Launch, ASignalEndsTheRunAfterItsStepWithItsWeights) {
  for (const auto& [signal, code] : {std::pair(SIGINT, 130), {SIGTERM, 75}, {SIGUSR1, 75}}) {
    const Result result =
        while_training("--overwrite=true",
                       [&, signal = signal](const Processes& p) { kill(p.launchers[0], signal); });
    EXPECT_EQ(result.code, code) << result.err;
    EXPECT_EQ(count(result.err, "moemamba: ending after this step"), 1) << result.err;
    EXPECT_EQ(count(result.err,
                    "of 1000000000, as asked; the same command with --overwrite=false goes on with "
                    "it; the weights are in " +
                        run()),
              1)
        << result.err;
    EXPECT_EQ(list_checkpoints(run()).size(), 1u);
    expect_whole(read_file(run() + "/metrics.jsonl"));
    const Result evaluated =
        shell("$moemamba evaluate --run run --data.validation=tokens/validation");
    EXPECT_EQ(evaluated.code, 0) << evaluated.err;
    std::filesystem::remove_all(run());
  }
}

// Without the launcher: a process alone, and mpirun as users start it on several machines.
TEST_F(Launch, ASignalEndsARunThatOthersStartedToo) {
  const std::string words = small_training(1'000'000'000);
  const std::tuple<const char*, const char*, int> cases[] = {
      {"$moemamba", "TERM", 75}, {"$moemamba", "USR1", 75}, {"$mpirun -n 2 $moemamba", "USR1", 75}};
  for (const auto& [program, signal, code] : cases) {
    const Result result = shell(std::string(program) + " train --overwrite=true" + words +
                                "& id=$!; until [ -s run/metrics.jsonl ]; do sleep 0.1; done; " +
                                "kill -" + signal + " $id; wait $id");
    EXPECT_EQ(result.code, code) << program << " " << signal << "\n" << result.err;
    EXPECT_EQ(count(result.err, "stopped    after step "), 1) << result.err;
    EXPECT_TRUE(file_exists(run() + "/weights/model.safetensors"));
    expect_whole(read_file(run() + "/metrics.jsonl"));
    std::filesystem::remove_all(run());
  }
}

// A step of minutes must not make an impatient user reach for SIGKILL: here one that never ends.
constexpr const char* kLongStep = "--train.progress=off --drill 'hang rank=0 step=1' ";

TEST_F(Launch, TheSecondSignalEndsTheRunAtOnce) {
  for (const auto& [second, name, code] :
       {std::tuple(SIGINT, "SIGINT", 130), {SIGTERM, "SIGTERM", 143}}) {
    const Result result =
        while_training(kLongStep, [&, second = second](const Processes& processes) {
          kill(processes.launchers[0], SIGTERM);
          // Two of a kind are one where the first has not been taken yet.
          for (int i = 0; i < 600 && !asked(); ++i)
            std::this_thread::sleep_for(std::chrono::milliseconds(10));
          kill(processes.launchers[0], second);
        });
    EXPECT_EQ(result.code, code) << result.err;
    EXPECT_EQ(count(result.err, std::string("moemamba: ") + name + ": the ranks were ended"), 1)
        << result.err;
    EXPECT_FALSE(file_exists(run() + "/weights"));
    std::filesystem::remove_all(run());
  }
}

// The same of a process alone, which nobody stands before. One that comes at once (Slurm sends two
// of a kind to some ranks) is the same word again.
TEST_F(Launch, TheSecondSIGTERMEndsAProcessAtOnce) {
  const Result result = shell("$moemamba train" + small_training(1'000'000'000) + kLongStep +
                              "& id=$!; until [ -s run/metrics.jsonl ]; do sleep 0.1; done; "
                              "kill -TERM $id; until grep -q 'ending after' shell.err; do "
                              "sleep 0.1; done; kill -TERM $id; sleep 3; kill -TERM $id || exit 1; "
                              "wait $id");
  EXPECT_EQ(result.code, 128 + SIGTERM) << result.err;
  EXPECT_EQ(count(result.err, "moemamba: ending after this step"), 1) << result.err;
  EXPECT_FALSE(file_exists(run() + "/weights"));
  EXPECT_TRUE(list_checkpoints(run()).empty());
}

// Whatever happens to the launcher, no rank is left behind.
TEST_F(Launch, RanksEndWithTheirLauncher) {
  const Result result = while_training("--train.progress=off", [](const Processes& processes) {
    kill(processes.launchers[0], SIGKILL);
  });
  EXPECT_NE(result.code, 0);
}

}  // namespace
}  // namespace moemamba
