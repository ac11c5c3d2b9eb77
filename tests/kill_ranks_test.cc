// Processes of a run are killed at random moments, again and again; the same command goes on, and
// the run ends as the one that nobody killed.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <filesystem>
#include <thread>

#include "core/random.h"
#include "tests/support/program.h"
#include "tests/support/small_run.h"
#include "tests/support/soak.h"

namespace moemamba {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

void pause(int64_t milliseconds) {
  std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
}

// Waits for `holds`, at most so long; returns whether it came to hold.
template <class Holds>
bool wait_until(Holds&& holds, std::chrono::milliseconds most) {
  for (const auto start = Clock::now(); !holds(); pause(2))
    if (Clock::now() - start > most) return false;
  return true;
}

// A child that nobody has waited for yet.
bool has_ended(pid_t child) {
  siginfo_t info{};
  return waitid(P_PID, id_t(child), &info, WEXITED | WNOHANG | WNOWAIT) != 0 ||
         info.si_pid == child;
}

class Kill : public ProgramTest {
 protected:
  std::string mark() const { return "--run=" + run(); }
  std::string metrics() const { return join_path(run(), "metrics.jsonl"); }

  // One launch in the background, its output in the file "said".
  pid_t start(const std::string& words) const {
    const pid_t id = fork();
    if (id != 0) return id;
    setpgid(0, 0);
    if (chdir((*this / "").c_str()) != 0) _exit(99);
    const std::string command =
        "exec " MOEMAMBA_BINARY_DIR "/moemamba train" + words + " >>said 2>&1 </dev/null";
    execl("/bin/sh", "sh", "-c", command.c_str(), nullptr);
    _exit(99);
  }
  // Its exit code, or minus the signal; when all of the run's processes are gone.
  int end_of(pid_t launcher) const {
    int status = 0;
    const bool ended = wait_until([&] { return waitpid(launcher, &status, WNOHANG) == launcher; },
                                  std::chrono::seconds(120));
    EXPECT_TRUE(ended) << "the launcher does not end";
    EXPECT_TRUE(
        wait_until([&] { return processes_with(mark()).empty(); }, std::chrono::seconds(30)))
        << "processes are left behind";
    for (pid_t id : processes_with(mark())) kill(id, SIGKILL);
    if (!ended) {
      kill(launcher, SIGKILL);
      waitpid(launcher, &status, 0);
    }
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }
  std::string said() const { return file_exists(*this / "said") ? read_file(*this / "said") : ""; }
};

TEST_F(Kill, AnySignalToAnyProcessSavesAndTheSameCommandGoesOn) {
  using Act = void (*)(const Processes&);
  const std::pair<const char*, Act> cases[] = {
      {"SIGUSR1 to the launcher", [](const Processes& p) { kill(p.launchers[0], SIGUSR1); }},
      {"SIGTERM to the launcher", [](const Processes& p) { kill(p.launchers[0], SIGTERM); }},
      {"SIGUSR1 to rank 0", [](const Processes& p) { kill(p.ranks[0], SIGUSR1); }},
      {"SIGUSR1 to rank 1", [](const Processes& p) { kill(p.ranks[1], SIGUSR1); }},
      {"SIGTERM to rank 1", [](const Processes& p) { kill(p.ranks[1], SIGTERM); }},
      {"SIGUSR1 to mpirun", [](const Processes& p) { kill(p.mpiruns[0], SIGUSR1); }}};
  int64_t before = 0;
  for (const auto& [name, act] : cases) {
    const auto size_before = file_exists(metrics()) ? fs::file_size(metrics()) : 0;
    const pid_t launcher = start(" --ranks 2" + small_training(1'000'000'000));
    wait_until([&] { return file_exists(metrics()) && fs::file_size(metrics()) != size_before; },
               std::chrono::seconds(60));
    const Processes processes = find_processes(mark());
    ASSERT_EQ(processes.launchers.size(), 1u) << name;
    ASSERT_EQ(processes.mpiruns.size(), 1u) << name;
    ASSERT_EQ(processes.ranks.size(), 2u) << name;
    act(processes);
    EXPECT_EQ(end_of(launcher), 75) << name << "\n" << said();
    EXPECT_EQ(count(said(), "stopped    after step "), 1) << name << "\n" << said();
    EXPECT_EQ(count(said(), "resumed    " + run()), before > 0) << said();
    const CheckpointManifest found = newest_manifest(run());
    EXPECT_GT(found.step(), before) << name;
    before = found.step();
    EXPECT_EQ(int64_t(steps_of(run()).size()), before) << name;
    fs::remove(*this / "said");
  }
  const std::vector<double> steps = numbers_of(read_file(metrics()), "step");
  for (size_t i = 0; i < steps.size(); ++i) ASSERT_EQ(steps[i], double(i));
  // On another layout, and to an end.
  const Result last = shell("$moemamba train" + small_training(before + 3));
  EXPECT_EQ(last.code, 0) << last.err;
  EXPECT_EQ(count(last.err, "2 experts: 2 ranks -> 1"), 1) << last.err;
  EXPECT_EQ(newest_manifest(run()).step(), before + 3);
  report_cases("signals to one process of a run", std::size(cases));
}

enum class Victim { rank, mpirun, launcher };
struct Blow {
  int signal;
  Victim victim;
  int code;  // of the launcher
};

// What a blow meets where there is anything left to hit.
pid_t choose(const Processes& processes, Victim victim, uint64_t draw) {
  const auto& list = victim == Victim::rank     ? processes.ranks
                     : victim == Victim::mpirun ? processes.mpiruns
                                                : processes.launchers;
  return list.empty() ? 0 : list[draw % list.size()];
}

// Signals, which ask, and kills, which do not.
const Blow kBlows[] = {{SIGTERM, Victim::launcher, 75}, {SIGUSR1, Victim::rank, 75},
                       {SIGKILL, Victim::rank, 75},     {SIGKILL, Victim::rank, 75},
                       {SIGKILL, Victim::rank, 75},     {SIGKILL, Victim::rank, 75},
                       {SIGKILL, Victim::mpirun, 75},   {SIGKILL, Victim::launcher, -SIGKILL}};

TEST_F(Kill, ARunIsTheSameHoweverOftenItWasKilled) {
  constexpr int64_t kSteps = 1200, kQuickKills = 20;
  const std::string words =
      " --ranks 2 --parallel.expert=2 --train.save_interval=20 "
      "--checkpoint.hash_interval=50 --train.progress=off --model.width=8 " +
      small_training(kSteps);
  // Nobody kills this one.
  ASSERT_EQ(end_of(start(words)), 0) << said();
  const std::vector<std::string> whole = steps_of(run());
  const CheckpointManifest wanted = newest_manifest(run());
  ASSERT_EQ(int64_t(whole.size()), kSteps);
  fs::remove_all(run());

  const Random random(test_seed(), "kills");
  uint64_t draw = 0;
  int64_t kills = 0, signals = 0, launches = 0, runs = 0, starts_hit = 0;
  const auto begin = Clock::now();
  const auto enough = std::chrono::seconds(soak_seconds());
  do {
    for (bool done = false, killed = false; !done;) {
      const bool over = kills >= kQuickKills && Clock::now() - begin >= enough;
      const auto size_before = file_exists(metrics()) ? fs::file_size(metrics()) : 0;
      const pid_t launcher = start(words);
      ++launches;
      if (over) {  // to its end
        const int code = end_of(launcher);
        ASSERT_TRUE(code == 0 || (killed && count(said(), "it is finished") > 0)) << said();
        break;
      }
      // One in four meets the start, the others a moment behind the first step.
      const Blow& blow = kBlows[size_t(random.uniform(draw++) * double(std::size(kBlows)))];
      const bool early = blow.signal == SIGKILL && random.uniform(draw++) < 0.25;
      if (!early)
        wait_until(
            [&] {
              return has_ended(launcher) ||
                     (file_exists(metrics()) && fs::file_size(metrics()) != size_before);
            },
            std::chrono::seconds(60));
      pause(int64_t(random.uniform(draw++) * (early ? 700 : 250)));
      const pid_t victim = choose(find_processes(mark()), blow.victim, uint64_t(draw++));
      const bool hit = victim > 0 && kill(victim, blow.signal) == 0;
      const int code = end_of(launcher);
      // A kill on its way out leaves a run that is done, which the next launch says.
      done = code == 0 || (code == 1 && killed && count(said(), "it is finished") > 0);
      killed = blow.signal == SIGKILL;
      if (!done) {
        // mpirun and the launcher may be hit before they have set up their handlers.
        EXPECT_TRUE(code == blow.code || (early && code < 0))
            << "code " << code << " after signal " << blow.signal << "\n"
            << said();
        ASSERT_TRUE(hit) << said();
      }
      if (hit && !done) {
        (blow.signal == SIGKILL ? kills : signals) += 1;
        starts_hit += early;
      }
    }
    EXPECT_EQ(steps_of(run()), whole);
    const CheckpointManifest found = newest_manifest(run());
    EXPECT_EQ(found.chain(), wanted.chain());
    EXPECT_EQ(found.state_hash(), wanted.state_hash());
    EXPECT_EQ(found.next_sample(), wanted.next_sample());
    EXPECT_TRUE(file_exists(run() + "/weights"));
    EXPECT_EQ(count(said(), "damaged"), 0) << said();
    fs::remove_all(run());
    fs::remove(*this / "said");
    ++runs;
  } while (!testing::Test::HasFailure() && (kills < kQuickKills || Clock::now() - begin < enough));
  std::printf("%lld launches of %lld runs, %lld kills met their start, %lld signals asked\n",
              static_cast<long long>(launches), static_cast<long long>(runs),
              static_cast<long long>(starts_hit), static_cast<long long>(signals));
  report_cases("kill -9 of a random process, resumed", kills);
}

}  // namespace
}  // namespace moemamba
