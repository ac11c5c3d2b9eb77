#include "launcher/process_sweep.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <thread>

#include "core/error.h"
#include "runtime/checkpoint_folder.h"
#include "runtime/process_facts.h"

namespace moemamba {
namespace {

using std::chrono::milliseconds;

// A process that sleeps, with these entries in its environment alone; killed and waited for.
class Sleeper {
 public:
  explicit Sleeper(std::vector<std::string> environment) {
    std::vector<char*> entries;
    for (std::string& entry : environment) entries.push_back(entry.data());
    entries.push_back(nullptr);
    char name[] = "/bin/sleep", seconds[] = "1000";
    char* words[] = {name, seconds, nullptr};
    pid_ = fork();
    if (pid_ == 0) {
      execve(name, words, entries.data());
      _exit(1);
    }
    // Found under its new name once exec has put its environment in place.
    for (int i = 0; i < 20000 && !named_sleep(); ++i) std::this_thread::sleep_for(milliseconds(1));
    EXPECT_TRUE(named_sleep());
  }
  ~Sleeper() {
    kill(pid_, SIGKILL);
    reap();
  }
  pid_t pid() const { return pid_; }
  bool alive() const { return process_start(pid_) != 0; }
  void reap() {
    if (pid_ > 0 && !reaped_) waitpid(pid_, nullptr, 0);
    reaped_ = true;
  }

 private:
  bool named_sleep() const {
    return std::ranges::any_of(marked_processes({}), [&](const FoundProcess& process) {
      return process.pid == pid_ && process.program == "sleep";
    });
  }
  pid_t pid_;
  bool reaped_ = false;
};

// Of this test alone: others may run beside it.
std::string entry(const std::string& name) {
  return concat(name, "=", getpid(), "-", fresh_nonce());
}

std::vector<pid_t> pids(const std::vector<FoundProcess>& processes) {
  std::vector<pid_t> ids;
  for (const FoundProcess& process : processes) ids.push_back(process.pid);
  std::sort(ids.begin(), ids.end());
  return ids;
}

TEST(ProcessSweep, FindsProcessesByWholeEntriesOfTheirEnvironment) {
  const std::string run = entry("RUN"), job = entry("JOB");
  const Sleeper both({"A=b", run, job}), longer({"X" + run, run + "x", job}), one({run});
  EXPECT_EQ(pids(marked_processes({.has = {run, job}, .lacks = {}})),
            std::vector<pid_t>{both.pid()});
  EXPECT_EQ(pids(marked_processes({.has = {run}, .lacks = {job}})), std::vector<pid_t>{one.pid()});
  EXPECT_EQ(marked_processes({.has = {run}, .lacks = {}}).size(), 2u);
}

TEST(ProcessSweep, DoesNotFindItsOwnProcess) {
  for (const FoundProcess& process : marked_processes({})) EXPECT_NE(process.pid, getpid());
}

TEST(ProcessSweep, KillsWhatIsLeftOverAndNothingElse) {
  const std::string run = entry("RUN"), old = entry("JOB"), now = entry("JOB");
  const Sleeper first({run, old}), second({run, old}), ours({run, now}), others({old});
  const Swept swept = sweep_processes({.has = {run}, .lacks = {now}}, std::chrono::seconds(30));
  std::vector<pid_t> expected{first.pid(), second.pid()};
  std::sort(expected.begin(), expected.end());
  EXPECT_EQ(pids(swept.killed), expected);
  EXPECT_TRUE(swept.left.empty()) << "zombies, which nobody has waited for yet, are gone";
  EXPECT_FALSE(first.alive() || second.alive());
  EXPECT_TRUE(ours.alive() && others.alive());
  EXPECT_NE(describe(swept.killed).find(concat("sleep (pid ", first.pid(), ")")),
            std::string::npos);
}

TEST(ProcessSweep, EndsAStoppedProcessToo) {
  const std::string run = entry("RUN");
  const Sleeper stopped({run});
  kill(stopped.pid(), SIGSTOP);
  EXPECT_TRUE(sweep_processes({.has = {run}, .lacks = {}}, std::chrono::seconds(30)).left.empty());
  EXPECT_FALSE(stopped.alive());
}

TEST(ProcessSweep, HasNothingToDoWhereNothingIs) {
  const Swept swept =
      sweep_processes({.has = {entry("RUN")}, .lacks = {}}, std::chrono::seconds(30));
  EXPECT_TRUE(swept.killed.empty() && swept.left.empty());
  EXPECT_THROW(sweep_processes({}, std::chrono::seconds(1)), Error);
}

TEST(ProcessFacts, KnowAProcessByItsStart) {
  EXPECT_GT(process_start(getpid()), 0);
  const std::string run = entry("RUN");
  Sleeper sleeper({run});
  const int64_t started = process_start(sleeper.pid());
  EXPECT_GE(started, process_start(getpid()));
  kill(sleeper.pid(), SIGKILL);
  sleeper.reap();
  EXPECT_NE(process_start(sleeper.pid()), started);
}

}  // namespace
}  // namespace moemamba
