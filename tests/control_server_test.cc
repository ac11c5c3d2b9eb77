// The supervisor's side of the control connections, against ranks that behave and peers that do
// not.
#include "launcher/supervisor/control_server.h"

#include <gtest/gtest.h>

#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/post.hpp>
#include <optional>
#include <thread>

#include "core/error.h"
#include "runtime/control_wire.h"
#include "tests/support/control_peer.h"

namespace moemamba {
namespace {

namespace asio = boost::asio;
using Clock = std::chrono::steady_clock;
using Peer = ControlPeer;

const std::string kSecret(32, 's'), kJob(32, '0');

Hello hello_of(int rank, const std::string& job = kJob, int ranks = 2, int64_t pid = 100) {
  Hello hello;
  hello.set_job(job);
  hello.set_rank(rank);
  hello.set_ranks(ranks);
  hello.set_host("here");
  hello.set_pid(pid);
  hello.set_pid_started(1);
  hello.set_boot_id("boot");
  return hello;
}

class Control : public testing::Test {
 protected:
  Control() {
    server_.emplace(context_, ControlServer::Options{.address = "127.0.0.1", .secret = kSecret},
                    ControlServer::Events{
                        .joined = [this](const Hello& hello,
                                         const std::string&) { joined_.push_back(hello.rank()); },
                        .said = [this](int rank, const ControlWord&) { said_.push_back(rank); },
                        .closed = [this](int rank) { closed_.push_back(rank); },
                        .refused = [this](const std::string& why) { refused_.push_back(why); }});
    server_->expect(kJob, 2, 5);
  }
  // Runs the server while `act` runs on another thread, and a little longer.
  void with_server(std::function<void()> act) {
    auto work = asio::make_work_guard(context_);
    std::thread peers([&] {
      act();
      work.reset();
      asio::post(context_, [this] { context_.stop(); });
    });
    context_.run();
    peers.join();
    context_.restart();
  }
  // What the server still has to take, until `holds`.
  void run_until(std::function<bool()> holds) {
    for (const auto begin = Clock::now();
         !holds() && Clock::now() - begin < std::chrono::seconds(20);)
      context_.run_one_for(std::chrono::milliseconds(50));
    EXPECT_TRUE(holds());
    context_.restart();
  }

  asio::io_context context_;
  std::optional<ControlServer> server_;
  std::vector<int> joined_, said_, closed_;
  std::vector<std::string> refused_;
};

TEST_F(Control, LetsARankInAndAnswersItsHeartbeats) {
  with_server([&] {
    Peer peer(server_->address());
    const auto welcome = peer.greet(hello_of(1), kSecret);
    ASSERT_TRUE(welcome);
    EXPECT_EQ(welcome->generation(), 5);
    EXPECT_EQ(welcome->fence_seconds(), 10);
    for (uint64_t number : {1, 2, 3}) {
      ControlWord word;
      word.mutable_heartbeat()->set_number(number);
      peer.send(word);
      const auto answer = peer.next();
      ASSERT_TRUE(answer && answer->has_pulse());
      EXPECT_EQ(answer->pulse().number(), number);
      EXPECT_EQ(answer->pulse().generation(), 5);
    }
  });
  run_until([&] { return !closed_.empty(); });
  EXPECT_EQ(joined_, std::vector<int>{1});
  EXPECT_EQ(said_, (std::vector<int>{1, 1, 1}));
  EXPECT_EQ(closed_, std::vector<int>{1});
  EXPECT_TRUE(refused_.empty());
}

TEST_F(Control, RefusesWhoDoesNotBelongToTheAttempt) {
  with_server([&] {
    const std::string other_secret(32, 'x'), other_job(32, '1');
    EXPECT_FALSE(Peer(server_->address()).greet(hello_of(0), other_secret));
    EXPECT_FALSE(Peer(server_->address()).greet(hello_of(0, other_job), kSecret));
    EXPECT_FALSE(Peer(server_->address()).greet(hello_of(2), kSecret));
    EXPECT_FALSE(Peer(server_->address()).greet(hello_of(-1), kSecret));
    EXPECT_FALSE(Peer(server_->address()).greet(hello_of(0, kJob, 3), kSecret));
  });
  run_until([&] { return refused_.size() == 5; });
  EXPECT_TRUE(joined_.empty());
  EXPECT_TRUE(closed_.empty());
}

TEST_F(Control, RefusesWordsThatAreNone) {
  with_server([&] {
    const std::string cases[] = {std::string(4, '\xff'), std::string("\x05\0\0\0hello", 9),
                                 "GET / HTTP/1.1\r\n\r\n", std::string("\x01\x10\0\0", 4)};
    for (const std::string& bytes : cases) {
      Peer peer(server_->address());
      ASSERT_TRUE(peer.next());  // the challenge
      peer.send_bytes(bytes);
      EXPECT_FALSE(peer.next());
    }
    Peer early(server_->address());  // a heartbeat before the greeting
    ASSERT_TRUE(early.next());
    ControlWord word;
    word.mutable_heartbeat()->set_number(1);
    early.send(word);
    EXPECT_FALSE(early.next());
  });
  run_until([&] { return refused_.size() == 5; });
  EXPECT_TRUE(said_.empty());
}

TEST_F(Control, ClosesWhoDoesNotGreetWithinFiveSeconds) {
  double seconds = 0;
  with_server([&] {
    const auto begin = Clock::now();
    Peer peer(server_->address());
    ASSERT_TRUE(peer.next());
    peer.send_bytes(std::string(1, '\x20'));  // a byte of a frame keeps nothing open
    EXPECT_FALSE(peer.next());
    seconds = std::chrono::duration<double>(Clock::now() - begin).count();
  });
  EXPECT_GT(seconds, 4.5);
  EXPECT_LT(seconds, 15);
}

TEST_F(Control, ManyStrangersKeepNoRankOut) {
  with_server([&] {
    std::vector<std::unique_ptr<Peer>> strangers;
    for (int i = 0; i < 400; ++i) {
      strangers.push_back(std::make_unique<Peer>(server_->address()));
      ASSERT_TRUE(strangers.back()->next());
    }
    EXPECT_TRUE(Peer(server_->address()).greet(hello_of(0), kSecret));
  });
  run_until([&] { return !joined_.empty(); });
  EXPECT_GE(refused_.size(), 400u - 256u - 2u);
}

TEST_F(Control, ARankThatComesAgainTakesItsOwnPlaceAndNobodyElses) {
  with_server([&] {
    Peer first(server_->address());
    ASSERT_TRUE(first.greet(hello_of(0), kSecret));
    Peer again(server_->address());
    EXPECT_TRUE(again.greet(hello_of(0), kSecret));
    EXPECT_FALSE(first.next());  // the older connection is closed
    Peer other(server_->address());
    EXPECT_FALSE(other.greet(hello_of(0, kJob, 2, /*pid=*/101), kSecret));
    ControlWord word;
    word.mutable_heartbeat()->set_number(7);
    again.send(word);
    EXPECT_TRUE(again.next());
    EXPECT_TRUE(closed_.empty());
  });
  EXPECT_EQ(joined_, (std::vector<int>{0, 0}));
  EXPECT_EQ(refused_.size(), 1u);
}

TEST_F(Control, TheNextAttemptCutsOffTheOneBefore) {
  const std::string next_job(32, '2');
  std::optional<Peer> next;  // there until the server is gone
  with_server([&] {
    Peer old(server_->address());
    ASSERT_TRUE(old.greet(hello_of(0), kSecret));
    asio::post(context_, [&] { server_->expect(next_job, 1, 6); });
    EXPECT_FALSE(old.next());
    EXPECT_FALSE(Peer(server_->address()).greet(hello_of(0), kSecret));
    next.emplace(server_->address());
    const auto welcome = next->greet(hello_of(0, next_job, 1), kSecret);
    ASSERT_TRUE(welcome);
    EXPECT_EQ(welcome->generation(), 6);
  });
  EXPECT_EQ(closed_, std::vector<int>{});
}

TEST_F(Control, OrdersReachTheRankTheyAreFor) {
  with_server([&] {
    Peer one(server_->address());
    ASSERT_TRUE(one.greet(hello_of(1), kSecret));
    asio::post(context_, [&] {
      ControlWord word;
      word.mutable_order()->set_what(Order::SEND_STACK);
      server_->send(0, word);  // is not there
      server_->send(1, word);
      EXPECT_TRUE(server_->connected(1));
      EXPECT_FALSE(server_->connected(0));
    });
    const auto word = one.next();
    ASSERT_TRUE(word && word->has_order());
    EXPECT_EQ(word->order().what(), Order::SEND_STACK);
  });
}

TEST(ControlAddress, IsNeverAllOfThem) {
  asio::io_context context;
  for (const char* address : {"0.0.0.0", "::", "", "node17", "192.0.2.1"})
    EXPECT_THROW(ControlServer(context, {.address = address, .secret = kSecret}, {}), Error)
        << address;
  for (const char* address : {"127.0.0.1", "::1"}) {
    try {
      ControlServer server(context, {.address = address, .secret = kSecret}, {});
      const std::string prefix = std::string(address) == "::1" ? "[::1]:" : "127.0.0.1:";
      EXPECT_EQ(server.address().rfind(prefix, 0), 0u) << server.address();
    } catch (const Error& error) {  // a machine without IPv6
      EXPECT_STREQ(address, "::1") << error.what();
    }
  }
}

}  // namespace
}  // namespace moemamba
