// `moemamba launch`, the real program, with an mpirun that starts nothing: the test speaks for the
// ranks, which so can be elsewhere, cut off or told of things that no real rank meets on one
// machine.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <memory>
#include <thread>

#include "core/activity.h"
#include "core/error.h"
#include "core/file.h"
#include "launcher/supervisor/job_state.h"
#include "tests/support/control_peer.h"
#include "tests/support/http_client.h"
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

ControlWord goodbye(Goodbye::Reason reason, const std::string& text) {
  ControlWord word;
  word.mutable_goodbye()->set_reason(reason);
  word.mutable_goodbye()->set_text(text);
  return word;
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

  pid_t start(const std::string& command_and_words, const std::string& variables = "") {
    fs::create_directories(*this / "bin");
    put("bin/mpirun", "#!/bin/sh\necho mpirun >>" + *this / "starts" +
                          "\n[ -z \"$BREAK\" ] || exit 1\nexec sleep 600\n");
    fs::permissions(*this / "bin/mpirun", fs::perms::owner_all);
    const pid_t id = fork();
    if (id != 0) {
      started_.push_back(id);
      return id;
    }
    setpgid(0, 0);
    if (chdir((*this / "").c_str()) != 0) _exit(99);
    const std::string command = "PATH=" + *this / "bin" + ":$PATH " + variables +
                                " exec " MOEMAMBA_BINARY_DIR "/moemamba " + command_and_words +
                                " >>said 2>&1 </dev/null";
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
  // A rank of the attempt at hand, once that is `attempt`, of another machine.
  std::unique_ptr<ControlPeer> join(int64_t attempt, int rank, const std::string& host,
                                    int ranks = 2) {
    std::optional<JobState> state;
    EXPECT_TRUE(wait_until([&] {
      state = read_job_state(in_run("supervisor"));
      return state && state->running && state->attempt == attempt;
    })) << said();
    job_ = state ? state->job : "";
    return come(rank, host, ranks);
  }
  std::unique_ptr<ControlPeer> come(int rank, const std::string& host, int ranks = 2) {
    const std::string address = read_file(in_run("supervisor/address"));
    auto peer = std::make_unique<ControlPeer>(address.substr(0, address.find('\n')));
    Hello hello;
    hello.set_job(job_);
    hello.set_rank(rank);
    hello.set_ranks(ranks);
    hello.set_host(host);
    hello.set_pid(100 + rank);
    hello.set_pid_started(1);
    hello.set_boot_id("another");
    EXPECT_TRUE(peer->greet(hello, read_secret(in_run("supervisor")))) << said();
    return peer;
  }
  int starts() const { return count(content(*this / "starts"), "mpirun"); }

 private:
  std::vector<pid_t> started_;
  std::string job_;
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

// Pages ask every two seconds, and learn why.
TEST_F(SpokenFor, AProbeSeesThatTheRunRecoversInVainAndThatItHasFailed) {
  const pid_t launcher = start(words() + "--launch.backoff_seconds=1", "BREAK=1");
  std::string url;
  ASSERT_TRUE(wait_until([&] { return !(url = content(in_run("supervisor/status_url"))).empty(); }))
      << said();
  const int port = std::stoi(url.substr(url.rfind(':') + 1));
  std::string seen;
  EXPECT_TRUE(wait_until([&] {
    seen += http_body(http_get(port, "/healthz"));
    return count(seen, "\nfailed: a crash loop") > 0;
  })) << seen
      << said();
  EXPECT_GT(count(seen, "recovering: 2 restarts without a new checkpoint"), 0) << seen;
  EXPECT_EQ(end_of(launcher), 1) << said();
}

// The attempts end before any has replaced it.
TEST_F(SpokenFor, WhatIsLeftOfARunThatIsOverwrittenCountsForNothing) {
  ASSERT_EQ(shell("$moemamba train" + small_training(3)).code, 0);
  EXPECT_EQ(end_of(start(words() + "--overwrite=true --launch.backoff_seconds=0", "BREAK=1")), 1);
  const auto state = read_job_state(in_run("supervisor"));
  ASSERT_TRUE(state);
  EXPECT_EQ(state->memory.best_saved, -1);
  EXPECT_EQ(count(said(), "the checkpoint of step 3"), 0) << said();
  EXPECT_TRUE(file_exists(in_run("overwriting")));
  // Who does not overwrite any more finds the run, and a record of events that is written.
  const int before = events_of("done");
  EXPECT_EQ(end_of(start("launch --ranks 1" + small_training(3))), 0) << said();
  EXPECT_EQ(events_of("done"), before + 1) << said();
}

// Those of others may be anywhere.
TEST_F(SpokenFor, AnErrorThatARankTellsCountsAgainstItsMachineAlone) {
  const pid_t launcher = start(words() + "--launch.fence_seconds=30");
  {
    auto one = join(1, 0, "node0"), other = join(1, 1, "node1");
    other->send(goodbye(Goodbye::FAILED, "the GPU is gone"));
    const auto end = one->next();
    ASSERT_TRUE(end && end->has_order()) << said();
    EXPECT_EQ(end->order().what(), Order::END);
  }
  join(2, 0, "node0");
  const auto state = read_job_state(in_run("supervisor"));
  ASSERT_TRUE(state);
  EXPECT_EQ(state->memory.failures, (std::map<std::string, int64_t>{{"node1", 1}})) << said();
  kill(launcher, SIGKILL);
  end_of(launcher);
}

// A machine that is cut off: the next attempt is without it, the one after that tries it again.
TEST_F(SpokenFor, AMachineThatDoesNotAnswerIsLeftOutOfOneAttempt) {
  put("hosts", "node0 slots=1\nnode1 slots=1\n");
  const pid_t launcher = start(words() +
                               "--launch.hostfile=hosts --launch.control_address=127.0.0.1 "
                               "--launch.min_ranks=1 --launch.lost_seconds=1 "
                               "--launch.fence_seconds=2 --launch.backoff_seconds=0");
  {
    auto one = join(1, 0, "node0"), cut_off = join(1, 1, "node1");
    ControlWord beat;
    beat.mutable_heartbeat()->set_number(1);
    ASSERT_TRUE(wait_until([&] {
      one->send(beat);
      return events_of("lost") == 1;
    })) << said();
    one.reset();
    one = join(2, 0, "node0", 1);
    EXPECT_EQ(content(in_run("supervisor/hosts")), "node0 slots=1\n");
    EXPECT_EQ(events_of("host_left_out"), 1) << said();
    EXPECT_EQ(count(said(), "node1 is left out of the next attempt"), 1) << said();
  }
  auto one = join(3, 0, "node0"), other = join(3, 1, "node1");
  EXPECT_EQ(content(in_run("supervisor/hosts")), "node0 slots=1\nnode1 slots=1\n");
  kill(launcher, SIGKILL);
  end_of(launcher);
}

// A link that was out for a moment: the order to end went into a dead connection.
TEST_F(SpokenFor, ARankThatComesBackWhileItsAttemptEndsIsToldToEnd) {
  const pid_t launcher = start(words() + "--launch.fence_seconds=30");
  auto one = join(1, 0, "node0"), other = join(1, 1, "node1");
  other.reset();
  const auto end = one->next();
  ASSERT_TRUE(end && end->has_order()) << said();
  one.reset();  // deaf to it, as if it had never come
  auto again = come(0, "node0");
  ControlWord word;
  word.mutable_heartbeat()->set_number(1);
  again->send(word);
  const auto first = again->next();
  ASSERT_TRUE(first && first->has_order()) << said();
  EXPECT_EQ(first->order().what(), Order::END);
  kill(launcher, SIGKILL);
  end_of(launcher);
}

// After a cut of seconds the end of the old connection may come before the new one.
TEST_F(SpokenFor, ABrokenConnectionOfARankThatWasSilentIsNotItsEnd) {
  const pid_t launcher = start(
      words() + "--launch.lost_seconds=4 --launch.fence_seconds=30 --launch.backoff_seconds=0");
  {
    auto one = join(1, 0, "node0");
    auto other = join(1, 1, "node1");
    const auto begin = Clock::now();
    std::this_thread::sleep_for(std::chrono::milliseconds(2200));  // agents leave it after 2 s
    other.reset();
    EXPECT_FALSE(wait_until([&] { return events_of("lost") > 0; }, 1.2)) << said();
    other = come(1, "node1");
    ASSERT_TRUE(wait_until([&] { return events_of("lost") > 0; })) << said();  // by silence
    EXPECT_GT(since(begin), 3.5);
  }
  // One that was just heard of has died.
  auto one = join(2, 0, "node0");
  const auto begin = Clock::now();
  join(2, 1, "node1");
  ASSERT_TRUE(wait_until([&] { return events_of("lost") > 1; })) << said();
  EXPECT_LT(since(begin), 3.5);
  kill(launcher, SIGKILL);
  end_of(launcher);
}

// A wrong wait of minutes, an old port that somebody has taken, and a page without a past.
TEST_F(SpokenFor, ASupervisorThatTakesOverKnowsWhatWasBefore) {
  boost::asio::io_context context;
  using boost::asio::ip::tcp;
  const tcp::endpoint any(boost::asio::ip::address_v4::loopback(), 0);
  auto taken = std::make_unique<tcp::acceptor>(context, any);
  const tcp::endpoint place = taken->local_endpoint();
  taken.reset();
  const std::string command = words() +
                              "--launch.hang_seconds=2 --launch.lost_seconds=20 "
                              "--launch.fence_seconds=60 --launch.status_port=" +
                              concat(place.port());
  const pid_t first = start(command);
  ControlWord beat, step;
  beat.mutable_heartbeat()->set_number(1);
  beat.mutable_heartbeat()->set_phase(int32_t(Phase::forward));
  step.mutable_step()->set_step(5);
  step.mutable_step()->set_seconds(0.01);
  {
    auto one = join(1, 0, "node0"), other = join(1, 1, "node1");
    for (const auto& peer : {one.get(), other.get()}) peer->send(step);
    ASSERT_TRUE(wait_until([&] {
      const auto state = read_job_state(in_run("supervisor"));
      return state && state->step_limit_ms == 2000;
    })) << said();
    kill(first, SIGKILL);
    EXPECT_EQ(end_of(first), -SIGKILL);
  }
  taken = std::make_unique<tcp::acceptor>(context, place);
  const pid_t second = start(command);
  ASSERT_TRUE(wait_until([&] { return events_of("taken_over") == 1; })) << said();
  auto one = come(0, "node0"), other = come(1, "node1");
  const auto begin = Clock::now();
  for (const auto& peer : {one.get(), other.get()}) peer->send(beat);
  std::string url;
  ASSERT_TRUE(wait_until([&] { return !(url = content(in_run("supervisor/status_url"))).empty(); }))
      << said();
  EXPECT_EQ(count(said(), concat("cannot listen on 127.0.0.1 port ", place.port())), 1) << said();
  const std::string shown =
      http_body(http_get(std::stoi(url.substr(url.rfind(':') + 1)), "/api/status"));
  EXPECT_EQ(count(shown, "attempt 1: its first step has ended"), 1) << shown;
  EXPECT_TRUE(wait_until([&] { return events_of("hang") == 1; })) << said();
  EXPECT_GT(since(begin), 1.5);
  EXPECT_LT(since(begin), 20);
  kill(second, SIGKILL);
  end_of(second);
}

TEST_F(SpokenFor, ARankThatItsSettingsHaveEndedIsNotStartedAgain) {
  const pid_t launcher = start(words() + "--launch.fence_seconds=30");
  {
    auto one = join(1, 0, "node0"), other = join(1, 1, "node1");
    one->send(goodbye(Goodbye::FINAL, "step 5 is not finite"));
    const auto end = other->next();
    ASSERT_TRUE(end && end->has_order()) << said();
  }
  EXPECT_EQ(end_of(launcher), 1) << said();
  EXPECT_EQ(starts(), 1) << said();
}

// What cannot be proven gone in time is left to its fence.
TEST_F(SpokenFor, TheSecondSignalIsHeardWhileAnAttemptEnds) {
  const pid_t launcher = start(words() + "--launch.fence_seconds=600");
  auto one = join(1, 0, "node0"), other = join(1, 1, "node1");
  kill(launcher, SIGTERM);
  ASSERT_TRUE(wait_until([&] { return events_of("preempted") == 1; })) << said();
  kill(launcher, SIGINT);
  EXPECT_EQ(end_of(launcher, 20), 130) << said();
  EXPECT_EQ(count(said(), "not proven gone: ranks elsewhere"), 1) << said();
}

}  // namespace
}  // namespace moemamba
