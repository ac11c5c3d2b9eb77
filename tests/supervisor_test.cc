// `moemamba launch`, the real program: whatever is killed or stopped, the run goes on by itself and
// ends as one that nobody disturbed.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <thread>

#include "runtime/checkpoint_folder.h"
#include "tests/support/program.h"
#include "tests/support/small_run.h"

namespace moemamba {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

double since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

template <class Holds>
bool wait_until(Holds&& holds, double most = 120) {
  for (const auto begin = Clock::now(); !holds();) {
    if (since(begin) > most) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return true;
}

class Supervised : public ProgramTest {
 protected:
  ~Supervised() override {
    for (const pid_t id : processes_with(mark())) kill(id, SIGKILL);
    for (const pid_t id : started_) waitpid(id, nullptr, WNOHANG);
  }

  std::string mark() const { return "--run=" + run(); }
  std::string metrics_file() const { return join_path(run(), "metrics.jsonl"); }
  std::string content(const std::string& file) const {
    return file_exists(file) ? read_file(file) : "";
  }
  std::string said() const { return content(*this / "said"); }
  std::string events() const { return content(join_path(run(), "events.jsonl")); }
  int events_of(const std::string& kind) const {
    return count(events(), "\"kind\":\"" + kind + "\"");
  }
  int64_t lines() const { return count(content(metrics_file()), "\n"); }
  // Words of a run of two ranks, of some ten steps a second and more.
  std::string words(int64_t steps) const {
    return " --ranks 2 --parallel.expert=2 --train.progress=off --train.save_interval=10 "
           "--launch.backoff_seconds=0.1 --launch.max_restarts=100 " +
           small_training(steps);
  }

  // A command of the program in the background, its output in the file "said".
  pid_t start(const std::string& command_and_words) {
    const pid_t id = fork();
    if (id != 0) {
      started_.push_back(id);
      return id;
    }
    setpgid(0, 0);
    if (chdir((*this / "").c_str()) != 0) _exit(99);
    const std::string command =
        "exec " MOEMAMBA_BINARY_DIR "/moemamba " + command_and_words + " >>said 2>&1 </dev/null";
    execl("/bin/sh", "sh", "-c", command.c_str(), nullptr);
    _exit(99);
  }
  // Its exit code, or minus the signal; nothing of the run is left then.
  int end_of(pid_t launcher, bool all_gone = true) {
    int status = 0;
    const bool ended = wait_until([&] { return waitpid(launcher, &status, WNOHANG) == launcher; });
    EXPECT_TRUE(ended) << "the launch does not end\n" << said() << events();
    if (!ended) return -999;
    if (all_gone) EXPECT_TRUE(processes_with(mark()).empty()) << said();
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }
  // Waits for `more` steps, of any attempt, and that both ranks are there.
  Processes after_steps(int64_t more = 1) {
    const int64_t before = lines();
    EXPECT_TRUE(wait_until([&] { return lines() >= before + more; })) << said() << events();
    Processes processes;
    EXPECT_TRUE(wait_until([&] {
      processes = find_processes(mark());
      return processes.ranks.size() == 2 && processes.mpiruns.size() == 1;
    })) << said();
    processes.ranks.resize(2);
    processes.mpiruns.resize(1);
    return processes;
  }
  // The run of the same words that nobody disturbs.
  CheckpointManifest undisturbed(int64_t steps) {
    EXPECT_EQ(end_of(start("train" + words(steps))), 0) << said();
    const CheckpointManifest manifest = newest_manifest(run());
    whole_ = steps_of(run());
    fs::remove_all(run());
    fs::remove(*this / "said");
    return manifest;
  }
  void expect_as(const CheckpointManifest& wanted) {
    const CheckpointManifest found = newest_manifest(run());
    EXPECT_EQ(found.step(), wanted.step());
    EXPECT_EQ(found.chain(), wanted.chain());
    EXPECT_EQ(found.state_hash(), wanted.state_hash());
    EXPECT_EQ(steps_of(run()), whole_);
  }

  std::vector<std::string> whole_;

 private:
  std::vector<pid_t> started_;
};

TEST_F(Supervised, RunsToItsEndAndSaysSoWhenItIsStartedAgain) {
  EXPECT_EQ(end_of(start("launch" + words(30))), 0) << said();
  EXPECT_EQ(lines(), 30);
  EXPECT_EQ(events_of("started"), 1) << events();
  EXPECT_EQ(events_of("done"), 1) << events();
  EXPECT_EQ(events_of("restarting"), 0) << events();
  EXPECT_EQ(end_of(start("launch" + words(30))), 0) << said();
  EXPECT_EQ(count(said(), "the run is finished: step 30 of 30"), 1) << said();
  EXPECT_EQ(events_of("started"), 1) << events();
  // More steps go on with it.
  EXPECT_EQ(end_of(start("launch" + words(40))), 0) << said();
  EXPECT_EQ(lines(), 40);
}

TEST_F(Supervised, KilledProcessesAreReplacedAndTheRunIsTheSame) {
  constexpr int64_t kSteps = 400;
  const CheckpointManifest wanted = undisturbed(kSteps);
  const pid_t launcher = start("launch" + words(kSteps));
  std::vector<double> seconds;
  for (const int victim : {0, 1, 2, 1}) {  // 2: mpirun
    const Processes processes = after_steps(5);
    const int resumed = events_of("resumed");
    const auto begin = Clock::now();
    kill(victim == 2 ? processes.mpiruns[0] : processes.ranks[size_t(victim)], SIGKILL);
    ASSERT_TRUE(wait_until([&] { return events_of("resumed") > resumed; })) << said() << events();
    const auto size = fs::file_size(metrics_file());
    ASSERT_TRUE(wait_until([&] { return fs::file_size(metrics_file()) > size; })) << said();
    seconds.push_back(since(begin));
  }
  EXPECT_EQ(end_of(launcher), 0) << said();
  expect_as(wanted);
  EXPECT_EQ(events_of("restarting"), 4) << events();
  EXPECT_EQ(events_of("lost"), 4) << events();
  EXPECT_GE(count(said(), "rank 1 on "), 2) << said();
  std::sort(seconds.begin(), seconds.end());
  std::printf("from kill -9 to the next step: %.2f to %.2f s\n", seconds.front(), seconds.back());
}

}  // namespace
}  // namespace moemamba
