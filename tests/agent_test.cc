// A rank's side of the control protocol, against a server of a few lines.
#include "launcher/agent.h"

#include <gtest/gtest.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <thread>

#include "launcher/agent_outbox.h"
#include "launcher/agent_parts.h"
#include "launcher/thread_stack.h"
#include "runtime/control_wire.h"
#include "runtime/process_facts.h"
#include "tests/support/temporary_folder.h"

namespace moemamba {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

const std::string kJob(32, 'a');

template <class Condition>
bool soon(Condition holds) {
  for (const auto end = Clock::now() + std::chrono::minutes(1); Clock::now() < end;) {
    if (holds()) return true;
    std::this_thread::sleep_for(milliseconds(1));
  }
  return holds();
}

// One end of a connection, on the thread of the test.
class Peer {
 public:
  explicit Peer(int socket) : socket_(socket) {}
  Peer(Peer&& other) noexcept : socket_(std::exchange(other.socket_, -1)) {}
  Peer& operator=(Peer&&) = delete;
  ~Peer() { close(); }
  void close() {
    if (socket_ >= 0) ::close(std::exchange(socket_, -1));
  }

  void say(const ControlWord& word) {
    std::string bytes;
    append_control_frame(word, bytes);
    EXPECT_EQ(::send(socket_, bytes.data(), bytes.size(), MSG_NOSIGNAL), ssize_t(bytes.size()));
  }
  // The next word, within a minute; nothing: the other side has closed, or is silent.
  std::optional<ControlWord> hear() {
    for (;;) {
      if (auto word = reader_.next()) return word;
      timeval minute{60, 0};
      setsockopt(socket_, SOL_SOCKET, SO_RCVTIMEO, &minute, sizeof minute);
      char bytes[4096];
      const ssize_t got = ::recv(socket_, bytes, sizeof bytes, 0);
      if (got <= 0) return std::nullopt;
      reader_.feed({bytes, size_t(got)});
    }
  }
  // The next word of a kind; heartbeats among the others are answered.
  std::optional<ControlWord> hear(ControlWord::WordCase kind, int64_t generation) {
    while (auto word = hear()) {
      if (word->has_heartbeat()) pulse(word->heartbeat().number(), generation);
      if (word->word_case() == kind) return word;
    }
    return std::nullopt;
  }
  void pulse(uint64_t number, int64_t generation) {
    ControlWord word;
    word.mutable_pulse()->set_number(number);
    word.mutable_pulse()->set_generation(generation);
    say(word);
  }
  void order(Order::What what) {
    ControlWord word;
    word.mutable_order()->set_what(what);
    word.mutable_order()->set_text("a test");
    say(word);
  }

 private:
  int socket_;
  ControlReader reader_;
};

// Listens, with its address in the file that agents read.
class Server {
 public:
  explicit Server(std::string folder) : folder_(std::move(folder)) {
    PosixFileSystem files;
    secret = make_secret(files, folder_);
    listen();
  }
  ~Server() { ::close(socket_); }
  void listen() {  // somewhere else
    if (socket_ >= 0) ::close(socket_);
    socket_ = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in at{};
    at.sin_family = AF_INET;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof at;
    EXPECT_EQ(::bind(socket_, reinterpret_cast<sockaddr*>(&at), size), 0);
    EXPECT_EQ(::listen(socket_, 8), 0);
    getsockname(socket_, reinterpret_cast<sockaddr*>(&at), &size);
    PosixFileSystem files;
    write_file(files, folder_ + "/address", concat("127.0.0.1:", ntohs(at.sin_port), "\n"));
  }
  Peer accept() {
    timeval minute{60, 0};
    setsockopt(socket_, SOL_SOCKET, SO_RCVTIMEO, &minute, sizeof minute);
    const int peer = ::accept(socket_, nullptr, nullptr);
    EXPECT_GE(peer, 0) << "no agent has connected";
    return Peer(peer);
  }
  // Up to the Welcome.
  Peer admit(int64_t generation = 7, double fence_seconds = 60, double heartbeat_seconds = 0.01) {
    Peer peer = accept();
    ControlWord challenge;
    *challenge.mutable_challenge() = make_challenge();
    peer.say(challenge);
    const auto answer = peer.hear();
    EXPECT_TRUE(answer && answer->has_hello());
    if (answer) {
      hello = answer->hello();
      check_hello(hello, secret, challenge.challenge().nonce());
    }
    ControlWord welcome;
    welcome.mutable_welcome()->set_generation(generation);
    welcome.mutable_welcome()->set_fence_seconds(fence_seconds);
    welcome.mutable_welcome()->set_heartbeat_seconds(heartbeat_seconds);
    welcome.mutable_welcome()->set_proof(supervisor_proof(secret, hello));
    peer.say(welcome);
    return peer;
  }

  std::string secret;
  Hello hello;  // of the latest

 private:
  std::string folder_;
  int socket_ = -1;
};

struct Scene {
  TemporaryFolder folder;
  Server server{folder / "supervisor"};
  std::atomic<int> exit_code = 0, stops = 0;

  Agent::Options options() {
    return {.folder = folder / "supervisor",
            .job = kJob,
            .rank = 2,
            .ranks = 4,
            .gpu = "a GPU",
            .fence_seconds = 60,
            .stop = [this] { ++stops; },
            .exit = [this](int code) { exit_code = code; }};
  }
};

TEST(Agent, ProvesItselfAndTellsWhoItIs) {
  Scene scene;
  Agent agent(scene.options());
  Peer peer = scene.server.admit(7);
  agent.wait_welcome();
  EXPECT_EQ(agent.generation(), 7);
  const Hello& hello = scene.server.hello;
  EXPECT_EQ(hello.job(), kJob);
  EXPECT_EQ(hello.rank(), 2);
  EXPECT_EQ(hello.ranks(), 4);
  EXPECT_EQ(hello.pid(), getpid());
  EXPECT_EQ(hello.pid_started(), process_start(getpid()));
  EXPECT_EQ(hello.boot_id(), boot_id());
  EXPECT_EQ(hello.gpu(), "a GPU");
  EXPECT_FALSE(hello.host().empty());
}

TEST(Agent, TellsWhatItsRankIsAtAndLearnsTheGeneration) {
  Scene scene;
  Agent agent(scene.options());
  agent.activity().begin_step(12);
  agent.activity().enter(Phase::exchange);
  agent.activity().at_layer(3);
  agent.activity().begin_collective(agent.activity().add_group("expert"));
  agent.activity().expect_rows(100);
  agent.activity().receive_rows(40);
  agent.set_gpu_bytes(5);
  Peer peer = scene.server.admit(7);
  const auto word = peer.hear(ControlWord::kHeartbeat, 8);
  ASSERT_TRUE(word);
  const Heartbeat& beat = word->heartbeat();
  EXPECT_EQ(beat.step(), 12);
  EXPECT_EQ(beat.phase(), int32_t(Phase::exchange));
  EXPECT_EQ(beat.layer(), 3);
  EXPECT_EQ(beat.collective(), 1);
  EXPECT_EQ(beat.group(), "expert");
  EXPECT_TRUE(beat.in_collective());
  EXPECT_EQ(beat.rows_expected(), 100);
  EXPECT_EQ(beat.rows_received(), 40);
  EXPECT_GT(beat.progress(), 0u);
  EXPECT_GT(beat.resident_bytes(), 1 << 20);
  EXPECT_EQ(beat.gpu_bytes(), 5);
  EXPECT_TRUE(soon([&] { return agent.generation() == 8; }));
}

TEST(Agent, ReportsStepsEventsAndItsGoodbye) {
  Scene scene;
  Agent agent(scene.options());
  Peer peer = scene.server.admit();
  agent.report({.step = 5, .seconds = 0.5, .busy_seconds = 0.25, .tokens = 64, .rows = 9});
  const auto step = peer.hear(ControlWord::kStep, 7);
  ASSERT_TRUE(step);
  EXPECT_EQ(step->step().step(), 5);
  EXPECT_EQ(step->step().busy_seconds(), 0.25);
  EXPECT_EQ(step->step().tokens(), 64);
  EXPECT_EQ(step->step().rows(), 9);
  EXPECT_FALSE(step->step().has_loss()) << "rank 0 speaks for all";
  RunEvent event;
  event.set_kind("saved");
  event.set_text(std::string(100000, 'x'));  // longer than a word
  agent.note(event);
  const auto noted = peer.hear(ControlWord::kEvent, 7);
  ASSERT_TRUE(noted);
  EXPECT_EQ(noted->event().kind(), "saved");
  std::thread ends([&] { agent.say_goodbye(Goodbye::LOST, "rank 3 is gone"); });
  const auto goodbye = peer.hear(ControlWord::kGoodbye, 7);
  ASSERT_TRUE(goodbye);
  EXPECT_EQ(goodbye->goodbye().reason(), Goodbye::LOST);
  EXPECT_EQ(goodbye->goodbye().text(), "rank 3 is gone");
  while (peer.hear()) {
  }
  peer.close();
  ends.join();
  EXPECT_EQ(scene.exit_code, 0);
}

TEST(Agent, FindsItsSupervisorAgainAtAnotherAddress) {
  Scene scene;
  Agent agent(scene.options());
  {
    Peer peer = scene.server.admit(7);
    agent.wait_welcome();
    ASSERT_TRUE(peer.hear(ControlWord::kHeartbeat, 7));
  }
  RunEvent event;
  event.set_kind("saved");
  agent.note(event);  // while nobody is there
  scene.server.listen();
  Peer peer = scene.server.admit(9);
  const auto noted = peer.hear(ControlWord::kEvent, 9);
  ASSERT_TRUE(noted);
  EXPECT_EQ(noted->event().kind(), "saved");
  EXPECT_TRUE(soon([&] { return agent.generation() == 9; }));
  EXPECT_EQ(scene.exit_code, 0);
}

TEST(Agent, LeavesAConnectionThatIsSilent) {
  Scene scene;
  Agent agent(scene.options());
  Peer silent = scene.server.admit(7, 10);
  Peer peer = scene.server.admit(8, 60);  // it connects once more
  ASSERT_TRUE(peer.hear(ControlWord::kHeartbeat, 8));
}

TEST(Agent, AsksForThePresentAttemptAgainAndAgain) {
  Scene scene;
  Agent agent(scene.options());
  for (int i = 0; i < 3; ++i) scene.server.accept().close();
  Peer peer = scene.server.admit();
  agent.wait_welcome();
}

TEST(Agent, DoesNotTakeASupervisorOfAnotherProtocol) {
  Scene scene;
  Agent agent(scene.options());
  {
    Peer peer = scene.server.accept();
    ControlWord challenge;
    *challenge.mutable_challenge() = make_challenge();
    challenge.mutable_challenge()->set_protocol(kControlProtocol + 1);
    peer.say(challenge);
    EXPECT_FALSE(peer.hear());
  }
  Peer peer = scene.server.admit();
  agent.wait_welcome();
}

// The port of a supervisor that died is free for anybody.
TEST(Agent, ObeysNobodyWhoDoesNotKnowTheSecret) {
  Scene scene;
  scene.server.secret = std::string(kSecretBytes, 'x');
  Agent::Options options = scene.options();
  options.fence_seconds = 4;
  Agent agent(options);
  const auto begin = Clock::now();
  for (int i = 0; i < 3; ++i) {  // it hangs up on each
    Peer peer = scene.server.accept();
    peer.order(Order::STOP);
    peer.order(Order::END);
    peer.pulse(0, 9);
    ControlWord word;
    *word.mutable_challenge() = make_challenge();
    peer.say(word);
    const auto answer = peer.hear();
    ASSERT_TRUE(answer && answer->has_hello());
    peer.order(Order::STOP);
    peer.order(Order::END);
    peer.pulse(0, 9);
    word.mutable_welcome()->set_generation(9);
    word.mutable_welcome()->set_fence_seconds(600);
    word.mutable_welcome()->set_proof(supervisor_proof(scene.server.secret, answer->hello()));
    peer.say(word);
    EXPECT_FALSE(peer.hear());
  }
  EXPECT_EQ(scene.stops, 0);
  EXPECT_EQ(agent.generation(), 0);
  EXPECT_TRUE(soon([&] { return scene.exit_code == 75; }));  // by its fence alone
  EXPECT_GE(Clock::now() - begin, milliseconds(3900));
}

TEST(Agent, EndsItsProcessWhereNobodyAnswers) {
  Scene scene;
  Agent agent(scene.options());
  const auto begun = Clock::now();
  Peer peer = scene.server.admit(7, 1);
  while (scene.exit_code == 0 && Clock::now() - begun < std::chrono::minutes(1)) {
    std::this_thread::sleep_for(milliseconds(1));  // hears nothing, says nothing
  }
  EXPECT_EQ(scene.exit_code, 75);
  EXPECT_GE(Clock::now() - begun, milliseconds(990));
}

TEST(Agent, EndsItsProcessWhereItIsNeverTakenIn) {
  Scene scene;
  Agent::Options options = scene.options();
  options.fence_seconds = 0.5;
  Agent agent(options);
  agent.wait_welcome();  // not for ever
  EXPECT_TRUE(soon([&] { return scene.exit_code == 75; }));
}

// Pulses that answer heartbeats of long ago are no sign of life.
TEST(Agent, CountsItsFenceFromTheHeartbeatThatWasAnswered) {
  Scene scene;
  Agent agent(scene.options());
  Peer peer = scene.server.admit(7, 1);
  const auto first = peer.hear();
  ASSERT_TRUE(first && first->has_heartbeat());
  std::atomic<bool> ends = false;
  std::thread repeats([&] {
    while (!ends) {
      peer.pulse(first->heartbeat().number(), 7);
      std::this_thread::sleep_for(milliseconds(20));
    }
  });
  EXPECT_TRUE(soon([&] { return scene.exit_code == 75; }));
  ends = true;
  repeats.join();
}

TEST(Agent, LivesAsLongAsItIsAnswered) {
  Scene scene;
  Agent agent(scene.options());
  Peer peer = scene.server.admit(7, 2);
  for (const auto begun = Clock::now(); Clock::now() - begun < milliseconds(3500);)
    ASSERT_TRUE(peer.hear(ControlWord::kHeartbeat, 7));
  EXPECT_EQ(scene.exit_code, 0);
}

TEST(Agent, ObeysOrders) {
  Scene scene;
  Agent agent(scene.options());
  Peer peer = scene.server.admit();
  peer.order(Order::STOP);
  EXPECT_TRUE(soon([&] { return scene.stops == 1; }));
  EXPECT_EQ(scene.exit_code, 0);
  peer.order(Order::END);
  EXPECT_TRUE(soon([&] { return scene.exit_code == 75; }));
}

std::string text_of(const Stack& stack) {
  std::string text;
  for (const std::string& frame : stack.frames()) text += frame + "\n";
  return text;
}

TEST(Agent, SendsTheStackOfTheThreadThatTrains) {
  Scene scene;
  struct sigaction action {};
  action.sa_handler = [](int) {};
  sigaction(SIGUSR1, &action, nullptr);
  std::atomic<bool> begun = false, ends = false, ended = false;
  std::thread trains([&] {
    const Agent agent(scene.options());
    begun = true;
    while (!ends) pause();  // which any signal ends
    ended = true;
  });
  {
    Peer peer = scene.server.admit();
    EXPECT_TRUE(soon([&] { return begun.load(); }));
    for (int i = 0; i < 3; ++i) {
      peer.order(Order::SEND_STACK);
      const auto word = peer.hear(ControlWord::kStack, 7);
      ASSERT_TRUE(word);
      const std::string text = text_of(word->stack());
      // Before it may stand the return from a signal's handler, which has no name everywhere.
      const size_t at = text.find("pause");
      ASSERT_NE(at, std::string::npos) << text;
      EXPECT_LE(std::count(text.begin(), text.begin() + int64_t(at), '\n'), 1)
          << "innermost first: " << text;
      EXPECT_NE(text.find("agent_test+0x"), std::string::npos) << text;
    }
    ends = true;
    EXPECT_TRUE(soon([&] {
      if (!ended) pthread_kill(trains.native_handle(), SIGUSR1);
      return ended.load();
    })) << "the thread goes on after it was asked";
  }
  trains.join();
  EXPECT_EQ(scene.exit_code, 0);
}

// A process of its own: the real end of one that slept too long.
TEST(Agent, EndsAProcessThatWasStoppedPastItsFence) {
  Scene scene;
  const pid_t rank = fork();
  if (rank == 0) {
    Agent::Options options = scene.options();
    options.exit = {};
    const Agent agent(options);
    for (;;) pause();
  }
  Peer peer = scene.server.admit(7, 1);
  ASSERT_TRUE(peer.hear(ControlWord::kHeartbeat, 7));
  kill(rank, SIGSTOP);
  int status = 0;
  ASSERT_EQ(waitpid(rank, &status, WUNTRACED), rank);
  for (uint64_t number = 1; number < 200; ++number) peer.pulse(number, 7);  // waits to be read
  std::this_thread::sleep_for(milliseconds(1500));
  kill(rank, SIGCONT);
  ASSERT_EQ(waitpid(rank, &status, 0), rank);
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 75);
}

TEST(AgentOutbox, DropsTheOldestStepsAndKeepsEvents) {
  AgentOutbox outbox(true);
  ControlWord event;
  event.mutable_event()->set_kind("saved");
  outbox.add(event);
  for (int64_t step = 0; step < 1000; ++step) outbox.add(Agent::Step{.step = step, .loss = 2});
  EXPECT_FALSE(outbox.empty());
  std::vector<ControlWord> words = outbox.take();
  ASSERT_EQ(words.size(), 257u);
  EXPECT_EQ(words.front().step().step(), 744);
  EXPECT_EQ(words[255].step().step(), 999);
  EXPECT_EQ(words[255].step().loss(), 2);
  EXPECT_TRUE(words.back().has_event());
  EXPECT_TRUE(outbox.empty());
  outbox.give_back(std::move(words));
  words = outbox.take();
  ASSERT_EQ(words.size(), 1u) << "steps are of no use later";
  EXPECT_EQ(words[0].event().kind(), "saved");
}

TEST(AgentOutbox, HoldsAThousandWordsInTheirOrder) {
  AgentOutbox outbox(false);
  for (int64_t i = 0; i < 1500; ++i) {
    ControlWord event;
    event.mutable_event()->set_step(i);
    outbox.add(event);
  }
  const std::vector<ControlWord> words = outbox.take();
  ASSERT_EQ(words.size(), 1000u);
  EXPECT_EQ(words.front().event().step(), 500);
  EXPECT_EQ(words.back().event().step(), 1499);
}

TEST(AgentOutbox, TakesChoicesOnceASecondAndWholeLayersOnly) {
  AgentOutbox outbox(true);
  std::vector<double> choices(100 * 100, 3);  // 81 layers of 100 experts fit into a word
  outbox.add_choices(5, 100, choices, 17);
  outbox.add_choices(6, 100, choices, 18);
  const std::vector<ControlWord> words = outbox.take();
  ASSERT_EQ(words.size(), 1u);
  const ExpertLoad& load = words[0].experts();
  EXPECT_EQ(load.step(), 5);
  EXPECT_EQ(load.layers(), 81);
  EXPECT_EQ(load.experts(), 100);
  EXPECT_EQ(load.choices_size(), 8100);
  EXPECT_EQ(load.choices(8099), 3u);
  EXPECT_EQ(load.dropped_rows(), 17);
  std::string frame;
  append_control_frame(words[0], frame);  // it may be sent
}

TEST(AgentParts, ReadAddressesAndNothingElse) {
  EXPECT_EQ(endpoint_of("127.0.0.1:4711")->port(), 4711);
  EXPECT_EQ(endpoint_of("[::1]:80")->address().to_string(), "::1");
  for (const char* text : {"", "127.0.0.1", "host:80", "127.0.0.1:0", "127.0.0.1:70000", ":80"})
    EXPECT_FALSE(endpoint_of(text)) << text;
}

TEST(ThreadStack, SaysInWhichStateAThreadIs) {
  const ThreadStack stack;
  EXPECT_FALSE(stack.answer()) << "nobody has asked";
  EXPECT_EQ(stack.kernel_state().substr(0, 1), "R");
}

}  // namespace
}  // namespace moemamba
