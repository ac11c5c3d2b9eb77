// A thousand slow connections and malformed requests on the status port of a run that trains: all
// of them are refused or timed out, and the ranks notice nothing. No port of the program is open to
// other machines.
#include <arpa/inet.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <thread>

#include "core/random.h"
#include "tests/support/fault_test.h"
#include "tests/support/http_client.h"
#include "tests/support/soak.h"

namespace moemamba {
namespace {

using Clock = Launched::Clock;
constexpr int64_t kEndless = 1'000'000'000;
constexpr int kSlow = 1000;

class FaultStatus : public FaultTest {
 protected:
  static int port_of(const Launched& launched) {
    const std::string file = launched.run() + "/supervisor/status_url";
    wait_until([&] { return file_exists(file) && !read_file(file).empty(); }, kPatience);
    const std::string url = read_file(file);
    return std::atoi(url.c_str() + url.rfind(':') + 1);
  }
};

// A client of which each connection sends the begin of a request, a byte a second, and comes again
// a second after it was cut off.
class SlowClients {
 public:
  explicit SlowClients(int port) : port_(port), thread_([this] { work(); }) {}
  ~SlowClients() {
    ends_ = true;
    thread_.join();
    for (const Slot& slot : slots_)
      if (slot.socket >= 0) close(slot.socket);
  }
  int64_t begun() const { return begun_; }
  int64_t cut_off() const { return cut_off_; }
  int64_t answered() const { return answered_; }  // with anything but a refusal

 private:
  struct Slot {
    int socket = -1;
    size_t sent = 0;
  };
  void work() {
    // A second's turn through all of them, in equal steps.
    for (size_t i = 0; !ends_; i = (i + 1) % slots_.size()) {
      act(slots_[i]);
      pause_for(1.0 / kSlow);
    }
  }
  void act(Slot& slot) {
    static const std::string request = "GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: ";
    if (slot.socket < 0) {
      slot.socket = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
      sockaddr_in to{};
      to.sin_family = AF_INET;
      to.sin_port = htons(uint16_t(port_));
      inet_pton(AF_INET, "127.0.0.1", &to.sin_addr);
      (void)!connect(slot.socket, reinterpret_cast<sockaddr*>(&to), sizeof to);
      slot.sent = 0;
      ++begun_;
      return;
    }
    char bytes[512];
    const ssize_t got = recv(slot.socket, bytes, sizeof bytes, 0);
    if (got > 0 && std::string(bytes, size_t(got)).find("HTTP/1.1 4") == std::string::npos)
      ++answered_;
    const char next = slot.sent < request.size() ? request[slot.sent] : 'a';
    const bool gone =
        got == 0 || (got < 0 && errno != EAGAIN) || send(slot.socket, &next, 1, MSG_NOSIGNAL) != 1;
    ++slot.sent;
    if (!gone) return;
    close(slot.socket);
    slot.socket = -1;
    ++cut_off_;
  }

  const int port_;
  std::atomic<bool> ends_ = false;
  std::atomic<int64_t> begun_ = 0, cut_off_ = 0, answered_ = 0;
  std::vector<Slot> slots_ = std::vector<Slot>(kSlow);
  std::thread thread_;
};

// What is no request, or none that is answered.
std::string malformed(const Random& random, uint64_t& draw) {
  static const std::string kinds[] = {
      "POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc",
      "GET / HTTP/1.1\nHost: localhost\n\n",
      "GET / HTTP/1.1\r\nHost : localhost\r\n\r\n",
      "GET / HTTP/1.1\r\nHost: localhost\r\n folded\r\n\r\n",
      "GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nTransfer-Encoding: "
      "chunked\r\n\r\n",
      "GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
      "GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
      "GET  / HTTP/1.1\r\nHost: localhost\r\n\r\n",
      "GET http://elsewhere/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
      "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
      "GET / HTTP/1.1\r\nHost: elsewhere.example\r\n\r\n",
      std::string("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 11)};
  const size_t kind = size_t(random.uniform(draw++) * double(std::size(kinds) + 2));
  if (kind < std::size(kinds)) return kinds[kind];
  if (kind == std::size(kinds))
    return "GET / HTTP/1.1\r\nHost: localhost\r\nX: " + std::string(9000, 'a') + "\r\n\r\n";
  std::string bytes;
  for (int i = 0; i < 300; ++i) bytes += char(random.uniform(draw++) * 256);
  return bytes + "\r\n\r\n";
}

// Milliseconds a step, over so long.
double step_milliseconds(const Launched& launched, double seconds) {
  const int64_t steps = launched.steps();
  const auto begin = Clock::now();
  pause_for(seconds);
  const double passed = seconds_since(begin);
  return passed * 1e3 / double(std::max<int64_t>(1, launched.steps() - steps));
}

struct Answers {
  std::atomic<int64_t> refused = 0, unanswered = 0, wrong = 0;
};

// Fifty of them a second, one after the other, until `ends`.
void ask_badly(int port, const Random& random, uint64_t& draw, Answers& answers,
               const std::atomic<bool>& ends) {
  for (; !ends; pause_for(0.02)) {
    HttpClient client(port);
    client.send(malformed(random, draw));
    const std::optional<std::string> answer = client.read_all(std::chrono::seconds(20));
    if (!answer)
      ++answers.wrong;  // neither refused nor timed out
    else if (answer->empty())
      ++answers.unanswered;
    else
      ++(http_status(*answer) >= 400 ? answers.refused : answers.wrong);
  }
}

TEST_F(FaultStatus, AThousandSlowConnectionsAndMalformedRequestsLeaveTheRanksAlone) {
  const Random random(test_seed(), "malformed requests");
  uint64_t draw = 0;
  Launched launched(*this / "", run(), words(kEndless) + " --train.save_interval=1000");
  launched.start();
  ASSERT_TRUE(launched.wait_for_steps(50, kPatience)) << launched.said();
  const int port = port_of(launched);
  ASSERT_GT(port, 0);
  const std::vector<pid_t> ranks = launched.processes().ranks;
  Answers answers;
  int64_t begun = 0, cut_off = 0, served = 0;
  std::vector<double> without, with;  // milliseconds a step, by turns
  const auto begin = Clock::now();
  do {
    without.push_back(step_milliseconds(launched, 3));
    const SlowClients slow(port);
    std::atomic<bool> ends = false;
    std::thread liar([&] { ask_badly(port, random, draw, answers, ends); });
    wait_until([&] { return slow.begun() >= kSlow; }, kPatience);
    with.push_back(step_milliseconds(launched, 6));
    // Who asks well is still served.
    for (int i = 0; i < 5; ++i) served += http_status(http_get(port, "/healthz")) == 200;
    ends = true;
    liar.join();
    EXPECT_EQ(slow.answered(), 0);
    begun += slow.begun();
    cut_off += slow.cut_off();
  } while (seconds_since(begin) < double(soak_seconds()) && !HasFailure());
  EXPECT_EQ(answers.wrong, 0);
  EXPECT_GT(answers.refused, 0);
  EXPECT_GT(cut_off, 0);
  EXPECT_GT(served, 0);
  EXPECT_EQ(http_status(http_get(port, "/healthz")), 200);
  EXPECT_EQ(launched.processes().ranks, ranks);
  EXPECT_EQ(launched.attempt(), 1);
  EXPECT_EQ(launched.events("lost").size() + launched.events("hang").size(), 0u);
  std::printf(
      "%lld slow connections, %lld of them cut off meanwhile; %lld of %lld good requests were "
      "served\n",
      static_cast<long long>(begun), static_cast<long long>(cut_off),
      static_cast<long long>(served), static_cast<long long>(5 * with.size()));
  std::printf("median step: %.3f ms without them, %.3f ms with them, in %zu rounds\n",
              percentile(without, 0.5), percentile(with, 0.5), with.size());
  report_cases("slow connections on the status port", begun);
  report_cases("malformed requests on the status port", answers.refused + answers.unanswered);
  kill(launched.supervisor(), SIGTERM);
  EXPECT_EQ(launched.end(30), 75) << launched.said();
}

// mpirun has ports of its own, which Open MPI 4 opens on all addresses whatever it is told.
TEST_F(FaultStatus, NoPortOfSupervisorOrRanksIsOpenToOtherMachines) {
  Launched launched(*this / "", run(), words(kEndless));
  launched.start();
  ASSERT_TRUE(launched.wait_for_steps(1, kPatience)) << launched.said();
  expect_listens_on(launched.supervisor(), {"127.0.0.1"}, 2);
  for (pid_t rank : launched.processes().ranks) expect_listens_on(rank, {"127.0.0.1"}, 0);
  kill(launched.supervisor(), SIGTERM);
  EXPECT_EQ(launched.end(30), 75) << launched.said();
}

}  // namespace
}  // namespace moemamba
