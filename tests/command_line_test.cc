// The program as a user meets it: messages, exit codes, signals. Runs the binary of this build.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <functional>
#include <thread>

#include "core/file.h"

namespace moemamba {
namespace {

const std::string kProgram = std::string(MOEMAMBA_BINARY_DIR) + "/moemamba";

struct Result {
  int code;
  std::string out, err;
};

std::string fresh_folder(const std::string& name) {
  const std::string folder = testing::TempDir() + "/command_line_" + name;
  std::filesystem::remove_all(folder);
  std::filesystem::create_directories(folder);
  return folder;
}

// `command` is for the shell; $moemamba is the program.
Result shell(const std::string& command) {
  const std::string folder = fresh_folder("shell");
  const std::string line = "moemamba='" + kProgram + "'; (" + command + ") >" + folder +
                           "/out 2>" + folder + "/err </dev/null";
  const int status = std::system(line.c_str());
  return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, read_file(folder + "/out"),
          read_file(folder + "/err")};
}

int count(const std::string& text, const std::string& part) {
  int found = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++found;
  return found;
}

// Token files of a small text, and the words that make a training of seconds out of it.
std::string small_training(const std::string& folder, const std::string& steps) {
  std::ofstream text(folder + "/text.txt");
  for (int i = 0; i < 500; ++i) text << "The " << i << "th sentence is like the one before.\n";
  text.close();
  const Result prepared = shell("$moemamba prepare --tokenizer bytes --output " + folder +
                                "/tokens " + folder + "/text.txt");
  EXPECT_EQ(prepared.code, 0) << prepared.err;
  return " --model.width=16 --model.blocks=1 --model.experts=2 --train.sequence_length=16 "
         "--train.global_batch_size=4 --train.steps=" + steps + " --run=" + folder +
         "/run --data.train=" + folder + "/tokens/train ";
}

TEST(CommandLine, ReportsAllWrongSettingsAtOnceWithExitCode2) {
  const std::string folder = fresh_folder("settings");
  std::ofstream(folder + "/run.textproto") << "model { experts: 2 top_k: 3 }\n"
                                              "parallel {\n  exprt: 2\n}\n";
  for (const char* ranks : {"", "--ranks 4 "}) {
    const Result result = shell(std::string("$moemamba train ") + ranks + "--config " + folder +
                                "/run.textproto --train.lr=-1 --overwrite=maybe");
    EXPECT_EQ(result.code, 2);
    EXPECT_EQ(result.out, "");
    for (const std::string& part :
         {folder + "/run.textproto:3:3: parallel.exprt: no such setting; did you mean \"expert\"?",
          folder + "/run.textproto:1:20: model.top_k: must be at most the 2 experts",
          std::string("--train.lr=-1: out of range: must be 0 to 10, found -1"),
          std::string("--overwrite=maybe: expected true or false, found \"maybe\""),
          std::string("data.train: no token files to train on")})
      EXPECT_EQ(count(result.err, part), 1) << part << "\nin\n" << result.err;
  }
}

TEST(CommandLine, RefusesLayoutsThatDoNotFit) {
  const std::string train = "$moemamba train --data.train=x ";
  Result result = shell(train + "--ranks 8 --parallel.expert=3");
  EXPECT_EQ(result.code, 2);
  EXPECT_EQ(count(result.err, "--parallel.expert=3: must divide the 8 ranks that were started; "
                              "try 1, 2, 4 or 8"),
            1) << result.err;
  result = shell(train + "--ranks 4 --parallel.expert=4 --model.experts=3");
  EXPECT_EQ(result.code, 2);
  EXPECT_EQ(count(result.err, "--parallel.expert=4: 4 ranks cannot share 3 experts"), 1);
  result = shell(train + "--train.routing_group=3");
  EXPECT_EQ(result.code, 2);
  EXPECT_EQ(count(result.err, "train.global_batch_size: 16 sequences are not a multiple of the 3"),
            1) << result.err;
}

TEST(CommandLine, RefusesWrongUsageWithExitCode2) {
  for (const char* words : {"", "trian", "train --ranks 0", "train --ranks x", "train --config",
                            "evaluate", "generate --run x --tokens 0", "prepare", "train extra",
                            "prepare --output x --tokenizer morse y",
                            "evaluate --run no/such/run"}) {
    const Result result = shell(std::string("$moemamba ") + words);
    EXPECT_EQ(result.code, 2) << words;
    EXPECT_FALSE(result.err.empty()) << words;
  }
}

TEST(CommandLine, HelpNamesEverySetting) {
  const Result result = shell("$moemamba train --help");
  EXPECT_EQ(result.code, 0);
  EXPECT_NE(result.out.find("--ranks"), std::string::npos);
  EXPECT_NE(result.out.find("--model.experts=8  (whole number, 0 to 4096)"), std::string::npos);
  EXPECT_NE(result.out.find("--data.train=(none)"), std::string::npos);
  for (const char* command : {"", "prepare", "evaluate", "generate", "settings"})
    EXPECT_EQ(shell(std::string("$moemamba ") + command + " --help").code, 0) << command;
}

TEST(CommandLine, VersionSaysWhatTheBuildIsMadeOf) {
  const Result result = shell("$moemamba --version");
  EXPECT_EQ(result.code, 0);
  for (const char* part : {"moemamba 0.", "compiler: ", "BLAS: OpenBLAS", "SIMD: avx"})
    EXPECT_NE(result.out.find(part), std::string::npos) << result.out;
}

// Out of date? Write it again: ./moemamba settings > docs/settings.md
TEST(CommandLine, TheReferencePageIsUpToDate) {
  const Result result = shell("$moemamba settings");
  EXPECT_EQ(result.code, 0);
  EXPECT_TRUE(result.out == read_file(std::string(MOEMAMBA_SOURCE_DIR) + "/docs/settings.md"))
      << "docs/settings.md differs from the schema: ./moemamba settings > docs/settings.md";
}

TEST(CommandLine, ShowsWhatSettingsResolveTo) {
  const Result result = shell("$moemamba settings --model.experts 32 --run=a");
  EXPECT_EQ(result.code, 0);
  EXPECT_EQ(count(result.out, "run: \"a\"\n"), 1);
  EXPECT_EQ(count(result.out, "  experts: 32\n"), 1);
  EXPECT_EQ(count(result.out, "  width: 192\n"), 1);
  EXPECT_EQ(shell("$moemamba settings --config " MOEMAMBA_SOURCE_DIR
                  "/configs/moe_mamba_25m.textproto")
                .code,
            0);
}

TEST(CommandLine, TrainsUnderMpirunAndHandsOnTheExitCode) {
  const std::string folder = fresh_folder("train");
  const std::string words = small_training(folder, "2");
  Result result = shell("$moemamba train --ranks 2 --parallel.expert 2" + words);
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_TRUE(file_exists(folder + "/run/metrics.jsonl"));
  result = shell("$moemamba train --ranks 2" + words);  // the folder holds a run
  EXPECT_EQ(result.code, 1) << result.err;
  EXPECT_NE(result.err.find("already holds a run"), std::string::npos) << result.err;
  result = shell("OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 mpirun -n 2 "
                 "--oversubscribe $moemamba train --overwrite=true" + words);
  EXPECT_EQ(result.code, 0) << result.err;
  result = shell("OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 mpirun -n 2 "
                 "--oversubscribe $moemamba train --ranks 3" + words);
  EXPECT_EQ(result.code, 2) << result.err;
  EXPECT_NE(result.err.find("mpirun has already started 2 ranks"), std::string::npos);
}

TEST(CommandLine, RanksWithOtherSettingsRefuseToStart) {
  const std::string folder = fresh_folder("agree");
  const std::string words = small_training(folder, "2");
  const Result result =
      shell("export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; "
            "mpirun --oversubscribe -n 1 $moemamba train " + words + " : -n 1 $moemamba train " +
            words + " --train.lr=0.5");
  EXPECT_EQ(result.code, 1) << result.err;
  EXPECT_NE(result.err.find("train.lr: rank 0 \"0.001\", rank 1 \"0.5\""), std::string::npos)
      << result.err;
  EXPECT_FALSE(file_exists(folder + "/run/config.textproto"));
}

std::string words_of(pid_t id, const char* what) {  // "cmdline" or "comm"
  std::ifstream file("/proc/" + std::to_string(id) + "/" + what, std::ios::binary);
  return std::string((std::istreambuf_iterator<char>(file)), {});
}

// Living processes that were started with `mark` among their words (zombies have none).
std::vector<pid_t> processes_with(const std::string& mark) {
  std::vector<pid_t> found;
  for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
    const pid_t id = std::atoi(entry.path().filename().c_str());
    if (id > 0 && words_of(id, "cmdline").find(mark) != std::string::npos) found.push_back(id);
  }
  return found;
}

struct Processes {
  std::vector<pid_t> launchers, ranks;
};

Processes programs_with(const std::string& mark) {
  Processes processes;
  for (pid_t id : processes_with(mark)) {
    if (words_of(id, "comm") != "moemamba\n") continue;  // the shell, mpirun
    const bool launcher = words_of(id, "cmdline").find("--ranks") != std::string::npos;
    (launcher ? processes.launchers : processes.ranks).push_back(id);
  }
  return processes;
}

// Starts an endless training with two ranks, calls `act` after its first steps, and expects that
// all of its processes end within 20 s. Returns what the launcher left behind.
Result while_training(const std::string& name, const std::function<void(const Processes&)>& act) {
  const std::string folder = fresh_folder(name);
  const std::string words = small_training(folder, "1000000000");
  const std::string mark = "--run=" + folder + "/run";
  std::thread actor([&] {
    const auto pause = [] { std::this_thread::sleep_for(std::chrono::milliseconds(100)); };
    const std::string metrics = folder + "/run/metrics.jsonl";
    for (int i = 0; i < 600 && (!file_exists(metrics) || read_file(metrics).empty()); ++i) pause();
    const Processes processes = programs_with(mark);
    EXPECT_EQ(processes.launchers.size(), 1u);
    EXPECT_EQ(processes.ranks.size(), 2u);
    if (processes.launchers.size() == 1 && processes.ranks.size() == 2) act(processes);
    for (int i = 0; i < 200 && !processes_with(mark).empty(); ++i) pause();
    for (pid_t id : processes_with(mark)) {
      ADD_FAILURE() << "still runs: " << id << " " << words_of(id, "comm");
      kill(id, SIGKILL);
    }
  });
  const Result result = shell("exec $moemamba train --ranks 2 --train.progress=off" + words);
  actor.join();
  return result;
}

TEST(CommandLine, ADeadRankEndsTheOthersAndIsNamed) {
  const Result result = while_training("dead", [](const Processes& processes) {
    kill(processes.ranks[1], SIGKILL);
  });
  EXPECT_NE(result.code, 0);
  EXPECT_NE(result.err.find("process rank "), std::string::npos) << result.err;
  EXPECT_NE(result.err.find("mpirun ended with exit code"), std::string::npos) << result.err;
}

TEST(CommandLine, PassesSignalsOn) {
  for (int signal : {SIGTERM, SIGINT}) {
    const Result result = while_training("signal", [&](const Processes& processes) {
      kill(processes.launchers[0], signal);
    });
    EXPECT_NE(result.code, 0);
  }
}

// Whatever happens to the launcher, no rank is left behind.
TEST(CommandLine, RanksEndWithTheirLauncher) {
  const Result result = while_training("orphans", [](const Processes& processes) {
    kill(processes.launchers[0], SIGKILL);
  });
  EXPECT_NE(result.code, 0);
}

}  // namespace
}  // namespace moemamba
