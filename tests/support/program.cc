#include "tests/support/program.h"

#include <signal.h>
#include <sys/wait.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <thread>

#include "core/file.h"

namespace moemamba {

int count(const std::string& text, const std::string& part) {
  int found = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++found;
  return found;
}

std::vector<double> numbers_of(const std::string& metrics, const std::string& field) {
  std::vector<double> numbers;
  const std::string name = "\"" + field + "\":";
  for (size_t at = metrics.find(name); at != std::string::npos; at = metrics.find(name, at + 1))
    numbers.push_back(std::strtod(metrics.c_str() + at + name.size(), nullptr));
  return numbers;
}

ProgramTest::Result ProgramTest::shell(const std::string& command) const {
  const std::string out = folder_ / "shell.out", err = folder_ / "shell.err";
  const std::string line = "cd " + folder_.path() +
                           "; export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
                           "; export OMPI_MCA_btl_vader_single_copy_mechanism=none"
                           "; moemamba=" MOEMAMBA_BINARY_DIR
                           "/moemamba; mpirun='mpirun --oversubscribe'; (" +
                           command + ") >" + out + " 2>" + err + " </dev/null";
  const int status = std::system(line.c_str());
  return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, read_file(out), read_file(err)};
}

std::string ProgramTest::small_training(int64_t steps) const {
  if (!file_exists(folder_ / "tokens")) {
    std::string text;
    for (int i = 0; i < 500; ++i)
      text += "The " + std::to_string(i) + "th sentence is like the one before.\n";
    put("text.txt", text);
    const Result prepared = shell(
        "$moemamba prepare --tokenizer bytes --held-out-fraction 0.1 --output tokens text.txt");
    EXPECT_EQ(prepared.code, 0) << prepared.err;
  }
  return " --model.width=16 --model.blocks=1 --model.experts=2 --train.sequence_length=16 "
         "--train.global_batch_size=4 --train.steps=" +
         std::to_string(steps) + " --run=" + run() + " --data.train=tokens/train ";
}

ProgramTest::Result ProgramTest::while_training(const std::string& words,
                                                std::function<void(const Processes&)> act) const {
  const std::string training = small_training(1'000'000'000);
  const std::string mark = "--run=" + run();
  std::thread actor([&] {
    const auto pause = [] { std::this_thread::sleep_for(std::chrono::milliseconds(100)); };
    const std::string metrics = join_path(run(), "metrics.jsonl");
    for (int i = 0; i < 600 && (!file_exists(metrics) || read_file(metrics).empty()); ++i) pause();
    const Processes processes = find_processes(mark);
    EXPECT_EQ(processes.launchers.size(), 1u);
    EXPECT_EQ(processes.ranks.size(), 2u);
    if (processes.launchers.size() == 1 && processes.ranks.size() == 2) act(processes);
    for (int i = 0; i < 200 && !processes_with(mark).empty(); ++i) pause();
    for (pid_t id : processes_with(mark)) {
      ADD_FAILURE() << "still runs: " << id << " " << words_of(id, "comm");
      kill(id, SIGKILL);
    }
  });
  const Result result = shell("exec $moemamba train --ranks 2" + training + words);
  actor.join();
  return result;
}

}  // namespace moemamba
