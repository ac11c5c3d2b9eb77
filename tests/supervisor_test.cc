// `moemamba launch`, the real program: whatever is killed or stopped, the run goes on by itself and
// ends as one that nobody disturbed.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <sstream>
#include <thread>

#include "launcher/supervisor/hosts.h"
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
  // For messages: without the saves.
  std::string story() const {
    std::istringstream lines(events());
    std::string text;
    for (std::string line; std::getline(lines, line);)
      if (count(line, "\"kind\":\"saved\"") == 0) text += line + "\n";
    return "\n" + said() + text;
  }
  int events_of(const std::string& kind) const {
    return count(events(), "\"kind\":\"" + kind + "\"");
  }
  int64_t lines() const { return count(content(metrics_file()), "\n"); }
  // Words of a run of two ranks, of some ten steps a second and more.
  std::string words(int64_t steps) const {
    return " --ranks 2" + small_training(steps) +
           "--parallel.expert=2 --train.progress=off --train.save_interval=10 --model.width=64 "
           "--train.sequence_length=256 --train.global_batch_size=8 --launch.backoff_seconds=0.1 "
           "--launch.max_restarts=100 --launch.crash_loop=100 ";
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
    EXPECT_TRUE(ended) << "the launch does not end" << story();
    if (!ended) return -999;
    if (all_gone) {
      EXPECT_TRUE(processes_with(mark()).empty()) << story();
    }
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }
  // Waits for `more` steps, of any attempt, and that both ranks are there.
  Processes after_steps(int64_t more = 1) {
    const int64_t before = lines();
    EXPECT_TRUE(wait_until([&] { return lines() >= before + more; })) << story();
    Processes processes;
    EXPECT_TRUE(wait_until([&] {
      processes = find_processes(mark());
      return processes.ranks.size() == 2 && processes.mpiruns.size() == 1;
    })) << story();
    processes.ranks.resize(2);
    processes.mpiruns.resize(1);
    return processes;
  }
  // The run of the same words that nobody disturbs.
  CheckpointManifest undisturbed(int64_t steps) {
    EXPECT_EQ(end_of(start("train" + words(steps))), 0) << story();
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
    const std::vector<std::string> steps = steps_of(run());
    ASSERT_EQ(steps.size(), whole_.size());
    for (size_t i = 0; i < steps.size(); ++i) ASSERT_EQ(steps[i], whole_[i]) << story();
  }

  std::vector<std::string> whole_;

 private:
  std::vector<pid_t> started_;
};

TEST_F(Supervised, RunsToItsEndAndSaysSoWhenItIsStartedAgain) {
  EXPECT_EQ(end_of(start("launch" + words(30))), 0) << story();
  EXPECT_EQ(lines(), 30);
  EXPECT_EQ(events_of("started"), 1) << story();
  EXPECT_EQ(events_of("done"), 1) << story();
  EXPECT_EQ(events_of("restarting"), 0) << story();
  EXPECT_EQ(end_of(start("launch" + words(30))), 0) << story();
  EXPECT_EQ(count(said(), "the run is finished: step 30 of 30"), 1) << story();
  EXPECT_EQ(events_of("started"), 1) << story();
  // More steps go on with it.
  EXPECT_EQ(end_of(start("launch" + words(40))), 0) << story();
  EXPECT_EQ(lines(), 40);
}

TEST_F(Supervised, KilledProcessesAreReplacedAndTheRunIsTheSame) {
  constexpr int64_t kSteps = 400;
  const CheckpointManifest wanted = undisturbed(kSteps);
  const pid_t launcher = start("launch" + words(kSteps));
  std::vector<double> seconds;
  for (const int victim : {0, 1, 2, 1}) {  // 2: mpirun
    const Processes processes = after_steps(5);
    const int training = events_of("training");
    const auto begin = Clock::now();
    kill(victim == 2 ? processes.mpiruns[0] : processes.ranks[size_t(victim)], SIGKILL);
    ASSERT_TRUE(wait_until([&] { return events_of("training") > training; })) << story();
    seconds.push_back(since(begin));
  }
  EXPECT_EQ(end_of(launcher), 0) << story();
  expect_as(wanted);
  EXPECT_EQ(events_of("restarting"), 4) << story();
  EXPECT_EQ(events_of("lost"), 4) << story();
  EXPECT_GE(count(said(), "rank 1 on "), 2) << story();
  std::sort(seconds.begin(), seconds.end());
  std::printf("from kill -9 to the next step: %.2f to %.2f s\n", seconds.front(), seconds.back());
}

// Its first supervisor dies; the second finds the ranks running and keeps them.
TEST_F(Supervised, ASupervisorThatDiesIsFollowedByTheSameCommandAndTheRanksGoOn) {
  constexpr int64_t kSteps = 600;
  // So that none meets the moment in which the ranks do not know of the new lease yet.
  const std::string seldom = "--train.save_interval=1000";
  const CheckpointManifest wanted = undisturbed(kSteps);
  pid_t launcher = start("launch" + words(kSteps) + seldom);
  const Processes before = after_steps(5);
  for (int round = 0; round < 2; ++round) {
    kill(launcher, SIGKILL);
    EXPECT_EQ(end_of(launcher, /*all_gone=*/false), -SIGKILL);
    launcher = start("launch" + words(kSteps) + seldom);
    ASSERT_TRUE(wait_until([&] { return events_of("taken_over") == round + 1; })) << story();
    const Processes after = after_steps(5);
    EXPECT_EQ(after.ranks, before.ranks);
    EXPECT_EQ(after.mpiruns, before.mpiruns);
  }
  EXPECT_EQ(end_of(launcher), 0) << story();
  expect_as(wanted);
  EXPECT_EQ(events_of("restarting"), 0) << story();
}

TEST_F(Supervised, RanksOfASupervisorThatNobodyFollowsEndThemselves) {
  const pid_t launcher =
      start("launch --launch.fence_seconds=2 --launch.lost_seconds=1.5" + words(1'000'000'000));
  after_steps();
  kill(launcher, SIGKILL);
  EXPECT_EQ(end_of(launcher, /*all_gone=*/false), -SIGKILL);
  EXPECT_TRUE(wait_until([&] { return processes_with(mark()).empty(); }, 60));
  // The same command begins again from the checkpoint.
  const pid_t again = start("launch" + words(1'000'000'000));
  after_steps();
  EXPECT_EQ(events_of("taken_over"), 0) << story();
  EXPECT_EQ(events_of("resumed"), 1) << story();
  kill(again, SIGTERM);
  EXPECT_EQ(end_of(again), 75) << story();
}

// On machines where no supervisor is: only their first ranks see to it.
TEST_F(Supervised, TheFirstRankOfAMachineRemovesWhatOpenMpiHasLeftThere) {
  const std::string supervisor = join_path(run(), "supervisor");
  const std::string session = *this / "ompi.here.0/pid.123", host = this_host();
  fs::create_directories(supervisor);
  fs::permissions(supervisor, fs::perms::owner_all);
  fs::create_directories(session);
  const std::string segment = concat("vader_segment.", host, ".", getuid(), ".fc", getpid(), ".");
  const std::string file = put("run/supervisor/leftovers-" + host, session + "\n" + segment + "\n");
  PosixFileSystem files;
  write_file(files, "/dev/shm/" + segment + "1", "x");
  EXPECT_EQ(end_of(start("launch" + words(5))), 0) << story();
  EXPECT_FALSE(file_exists(session));
  EXPECT_FALSE(file_exists("/dev/shm/" + segment + "1"));
  files.remove("/dev/shm/" + segment + "1");
  // And says where its own are.
  EXPECT_EQ(count(content(file), "/ompi."), 1) << content(file);
  EXPECT_EQ(count(content(file), "vader_segment." + host + "."), 1) << content(file);
  EXPECT_EQ(count(content(file), session), 0) << content(file);
}

TEST_F(Supervised, ARankThatIsStoppedIsFoundAndNamed) {
  constexpr int64_t kSteps = 200;
  const CheckpointManifest wanted = undisturbed(kSteps);
  const pid_t launcher = start("launch --launch.lost_seconds=2" + words(kSteps));
  const Processes processes = after_steps(5);
  kill(processes.ranks[1], SIGSTOP);
  EXPECT_EQ(end_of(launcher), 0) << story();
  expect_as(wanted);
  EXPECT_EQ(events_of("lost"), 1) << story();
  EXPECT_EQ(count(events(), "rank 1 on "), 1) << story();
  EXPECT_EQ(count(events(), "its process is stopped (SIGSTOP)"), 1) << story();
  EXPECT_EQ(count(said(), ">1"), 1) << story();  // in the table of all ranks
}

TEST_F(Supervised, ARankThatHangsIsFoundAndNamedWithItsStack) {
  constexpr int64_t kSteps = 100;
  const CheckpointManifest wanted = undisturbed(kSteps);
  const pid_t launcher =
      start("launch --launch.hang_seconds=3 --drill 'hang rank=1 step=25'" + words(kSteps));
  EXPECT_EQ(end_of(launcher), 0) << story();
  expect_as(wanted);
  EXPECT_EQ(events_of("hang"), 1) << story();
  EXPECT_EQ(count(events(), "rank 1 on "), 1) << story();
  EXPECT_GE(count(said(), "hangs at step 25"), 1) << story();
  const std::string stack = said().substr(std::min(said().size(), said().find("its stack:")));
  EXPECT_NE(stack.find("sleep"), std::string::npos) << story();
  EXPECT_NE(stack.find("main"), std::string::npos) << story();
}

// What ends everything at one step is not repeated for ever.
TEST_F(Supervised, ACrashLoopIsReportedInsteadOfRepeated) {
  const pid_t launcher = start(
      "launch --drill 'crash rank=1 step=35 times=always' "
      "--drill 'slow rank=0 factor=100 from=31'" +  // till 30 is saved
      words(1'000'000'000) +
      "--launch.crash_loop=3");
  EXPECT_EQ(end_of(launcher), 1) << story();
  EXPECT_EQ(events_of("crash_loop"), 1) << story();
  EXPECT_EQ(events_of("restarting"), 2) << story();
  EXPECT_EQ(count(said(), "a crash loop: 3 failures at step "), 1) << story();
  EXPECT_EQ(list_checkpoints(run()).front().step, 30);
}

// The settings say so: another attempt would meet the same.
TEST_F(Supervised, AStepThatIsNotFiniteEndsTheRunOnceWhereItIsToStop) {
  const pid_t launcher = start("launch --drill 'nan rank=1 step=25 times=always'" + words(60) +
                               "--train.on_nonfinite=STOP");
  EXPECT_EQ(end_of(launcher), 1) << story();
  EXPECT_EQ(events_of("failed"), 2) << story();  // the attempt, and with it the run
  EXPECT_EQ(events_of("restarting"), 0) << story();
  EXPECT_GE(count(said(), "train.on_nonfinite=STOP ends the run here"), 1) << story();
}

TEST_F(Supervised, ASignalSavesAndTheSameCommandGoesOn) {
  const std::pair<int, int> cases[] = {{SIGTERM, 75}, {SIGUSR1, 75}, {SIGINT, 130}};
  int64_t before = -1;
  for (const auto& [signal, code] : cases) {
    const pid_t launcher = start("launch" + words(1'000'000'000));
    after_steps();
    const auto begin = Clock::now();
    kill(launcher, signal);
    EXPECT_EQ(end_of(launcher), code) << story();
    std::printf("from signal %d to the end: %.2f s\n", signal, since(begin));
    const CheckpointManifest manifest = newest_manifest(run());
    EXPECT_GT(manifest.step(), before);
    before = manifest.step();
    EXPECT_EQ(lines(), before) << "a step was lost";
  }
  EXPECT_EQ(events_of("preempted"), 3) << story();
  EXPECT_EQ(events_of("restarting"), 0) << story();
}

TEST_F(Supervised, ASaveThatDoesNotFitInTheGraceIsNotBegun) {
  // One save is measured first; 5 s of the grace are not ours, so nothing is left for another.
  const pid_t launcher = start("launch --launch.grace_seconds=5" + words(1'000'000'000));
  ASSERT_TRUE(wait_until([&] { return events_of("saved") > 0; })) << story();
  after_steps();
  kill(launcher, SIGTERM);
  EXPECT_EQ(end_of(launcher), 75) << story();
  EXPECT_EQ(count(said(), "does not fit in 0 s"), 1) << story();
  EXPECT_EQ(list_checkpoints(run()).front().step % 10, 0) << "it was saved at the signal";
}

TEST_F(Supervised, TheSecondSignalEndsAllAtOnce) {
  const pid_t launcher =
      start("launch --train.sequence_length=1000 --model.width=192 " + words(1'000'000'000) +
            "--train.sequence_length=1000 --train.global_batch_size=64 "
            "--model.width=192 --model.blocks=4");
  ASSERT_TRUE(wait_until([&] { return events_of("started") > 0; })) << story();
  kill(launcher, SIGTERM);
  ASSERT_TRUE(wait_until([&] { return events_of("preempted") > 0; })) << story();
  kill(launcher, SIGTERM);
  const auto begin = Clock::now();
  EXPECT_EQ(end_of(launcher), 75) << story();
  EXPECT_LT(since(begin), 30);
  EXPECT_TRUE(list_checkpoints(run()).empty());
}

TEST_F(Supervised, ASecondSupervisorEndsAndNamesTheFirst) {
  const pid_t first = start("launch" + words(1'000'000'000));
  after_steps();
  const auto begin = Clock::now();
  const pid_t second = start("launch" + words(1'000'000'000));
  EXPECT_EQ(end_of(second, /*all_gone=*/false), 1);
  std::printf("the second one ended after %.2f s\n", since(begin));
  EXPECT_EQ(count(said(), "process " + std::to_string(first) + " on "), 1) << story();
  after_steps();
  EXPECT_EQ(events_of("started"), 1) << story();
  kill(first, SIGTERM);
  EXPECT_EQ(end_of(first), 75) << story();
}

TEST_F(Supervised, OverwritesOnceHoweverOftenItStartsAgain) {
  EXPECT_EQ(end_of(start("launch" + words(20))), 0) << story();
  const pid_t launcher = start("launch --overwrite=true --train.seed=7" + words(60));
  ASSERT_TRUE(wait_until([&] { return events_of("done") == 0 && events_of("saved") > 0; }))
      << story();
  const Processes processes = find_processes(mark());
  ASSERT_FALSE(processes.ranks.empty());
  kill(processes.ranks[0], SIGKILL);
  EXPECT_EQ(end_of(launcher), 0) << story();
  EXPECT_EQ(events_of("started"), 2) << story();
  EXPECT_EQ(count(events(), "no checkpoint"), 0) << story();
  EXPECT_EQ(lines(), 60);
  EXPECT_FALSE(file_exists(join_path(run(), "overwriting")));
}

// A scheduler, or a script, starts the very same command again.
TEST_F(Supervised, OverwritesOnceAlsoWhereItIsStartedAgain) {
  EXPECT_EQ(end_of(start("launch" + words(20))), 0) << story();
  const std::string command =
      "launch --overwrite=true --train.seed=7 --launch.fence_seconds=2 "
      "--launch.lost_seconds=1" +
      words(1'000'000'000);
  pid_t launcher = start(command);
  ASSERT_TRUE(wait_until([&] { return events_of("done") == 0 && events_of("saved") > 0; }))
      << story();
  kill(launcher, SIGTERM);
  EXPECT_EQ(end_of(launcher), 75) << story();
  int64_t steps = lines();
  for (const int signal : {SIGKILL, SIGINT, SIGTERM}) {
    launcher = start(command);
    after_steps();
    EXPECT_GT(lines(), steps) << story();
    steps = list_checkpoints(run()).front().step;
    kill(launcher, signal);
    EXPECT_EQ(end_of(launcher, /*all_gone=*/false), signal == SIGTERM  ? 75
                                                    : signal == SIGINT ? 130
                                                                       : -SIGKILL)
        << story();
    ASSERT_TRUE(wait_until([&] { return processes_with(mark()).empty(); })) << story();
  }
  EXPECT_GE(events_of("resumed"), 3) << story();
}

TEST_F(Supervised, WrongSettingsEndItBeforeAnythingBegins) {
  EXPECT_EQ(end_of(start("launch --train.stepz=3" + words(10))), 2);
  EXPECT_EQ(end_of(start("launch --launch.hostfile=missing" + words(10))), 2);
  EXPECT_EQ(end_of(start("launch --launch.min_ranks=3" + words(10))), 2);
  EXPECT_EQ(end_of(start("launch --launch.heartbeat_seconds=2" + words(10))), 2);
  EXPECT_EQ(end_of(start("launch --launch.fence_seconds=5" + words(10))), 2);
  EXPECT_EQ(end_of(start("launch --launch.status_address=0.0.0.0" + words(10))), 2);
  EXPECT_EQ(end_of(start("launch --launch.control_address=0.0.0.0" + words(10))), 2);
  EXPECT_EQ(end_of(start("launch" + words(10) + "--data.train=missing")), 1);
  EXPECT_FALSE(file_exists(run()));
}

}  // namespace
}  // namespace moemamba
