// `moemamba launch`, the real program, with an mpirun that starts nothing: the test speaks for the
// ranks, which so can be elsewhere, cut off or told of things that no real rank meets on one machine.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <thread>

#include "core/error.h"
#include "core/file.h"
#include "tests/support/control_peer.h"
#include "tests/support/program.h"

namespace moemamba {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

double since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

template <class Holds>
bool wait_until(Holds&& holds, double most = 60) {
  for (const auto begin = Clock::now(); !holds();) {
    if (since(begin) > most) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return true;
}

class SpokenFor : public ProgramTest {
 protected:
  ~SpokenFor() override {
    for (const pid_t id : processes_with("--run=" + run())) kill(id, SIGKILL);
    for (const pid_t id : started_) waitpid(id, nullptr, WNOHANG);
  }

  std::string content(const std::string& file) const {
    return file_exists(file) ? read_file(file) : "";
  }
  std::string in_run(const std::string& name) const { return join_path(run(), name); }
  std::string said() const { return content(*this / "said"); }
  int events_of(const std::string& kind) const {
    return count(content(in_run("events.jsonl")), "\"kind\":\"" + kind + "\"");
  }
  std::string words() const { return "launch --ranks 2" + small_training(1000); }

  pid_t start(const std::string& command_and_words) {
    fs::create_directories(*this / "bin");
    put("bin/mpirun", "#!/bin/sh\necho mpirun >>" + *this / "starts" + "\nexec sleep 600\n");
    fs::permissions(*this / "bin/mpirun", fs::perms::owner_all);
    const pid_t id = fork();
    if (id != 0) {
      started_.push_back(id);
      return id;
    }
    setpgid(0, 0);
    if (chdir((*this / "").c_str()) != 0) _exit(99);
    const std::string command = "PATH=" + *this / "bin" + ":$PATH exec " MOEMAMBA_BINARY_DIR
                                "/moemamba " + command_and_words + " >>said 2>&1 </dev/null";
    execl("/bin/sh", "sh", "-c", command.c_str(), nullptr);
    _exit(99);
  }
  // Its exit code, or minus the signal.
  int end_of(pid_t launcher, double most = 60) {
    int status = 0;
    const bool ended =
        wait_until([&] { return waitpid(launcher, &status, WNOHANG) == launcher; }, most);
    EXPECT_TRUE(ended) << "the launch does not end\n" << said();
    if (!ended) return -999;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }
  int starts() const { return count(content(*this / "starts"), "mpirun"); }

 private:
  std::vector<pid_t> started_;
};

// Ranks of another machine may live up to their fence: until then nothing is started, and after a
// signal nothing at all.
TEST_F(SpokenFor, ASignalBeforeTheFirstAttemptEndsAll) {
  fs::create_directories(in_run("supervisor"));
  fs::permissions(in_run("supervisor"), fs::perms::owner_all);
  put("run/supervisor/state.json", "{\"version\":1,\"running\":1,\"host\":\"elsewhere\"}");
  put("hosts", "elsewhere slots=2\n");
  const pid_t launcher = start(words() +
                               "--launch.hostfile=hosts --launch.control_address=127.0.0.1 "
                               "--launch.fence_seconds=6");
  ASSERT_TRUE(wait_until([&] { return count(said(), "can be watched at") > 0; })) << said();
  kill(launcher, SIGTERM);
  EXPECT_EQ(end_of(launcher), 75) << said();
  EXPECT_EQ(starts(), 0) << said();
}

}  // namespace
}  // namespace moemamba
