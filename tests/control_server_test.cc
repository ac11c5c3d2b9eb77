// The supervisor's side of the control connections, against ranks that behave and peers that do
// not.
#include "launcher/supervisor/control_server.h"

#include <gtest/gtest.h>

#include <boost/asio/connect.hpp>
#include <boost/asio/read.hpp>
#include <boost/asio/write.hpp>
#include <optional>
#include <thread>

#include "core/error.h"
#include "runtime/control_wire.h"

namespace moemamba {
namespace {

namespace asio = boost::asio;
using asio::ip::tcp;
using Clock = std::chrono::steady_clock;

const std::string kSecret(32, 's'), kJob(32, '0');

// A peer on a blocking socket.
class Peer {
 public:
  explicit Peer(const std::string& address) : socket_(context_) {
    const size_t colon = address.rfind(':');
    socket_.connect({asio::ip::make_address(address.substr(0, colon)),
                     static_cast<unsigned short>(std::stoi(address.substr(colon + 1)))});
  }
  void send(const ControlWord& word) {
    std::string frame;
    append_control_frame(word, frame);
    send_bytes(frame);
  }
  void send_bytes(const std::string& bytes) {
    boost::system::error_code ignored;  // it may have been closed
    asio::write(socket_, asio::buffer(bytes), ignored);
  }
  // Nothing: the connection was closed.
  std::optional<ControlWord> next() {
    for (;;) {
      if (auto word = reader_.next()) return word;
      char bytes[4096];
      boost::system::error_code error;
      const size_t got = socket_.read_some(asio::buffer(bytes), error);
      if (error) return std::nullopt;
      reader_.feed({bytes, got});
    }
  }
  Hello hello(const std::string& nonce, int rank, const std::string& secret = kSecret,
              const std::string& job = kJob, int ranks = 2, int64_t pid = 100) {
    Hello hello;
    hello.set_protocol(kControlProtocol);
    hello.set_proof(control_proof(secret, nonce, job, rank));
    hello.set_job(job);
    hello.set_rank(rank);
    hello.set_ranks(ranks);
    hello.set_host("here");
    hello.set_pid(pid);
    hello.set_pid_started(1);
    hello.set_boot_id("boot");
    return hello;
  }
  // Answers the challenge; returns the Welcome, or nothing where it was refused.
  template <class... Words>
  std::optional<Welcome> greet(Words... words) {
    const auto challenge = next();
    if (!challenge || !challenge->has_challenge()) return std::nullopt;
    ControlWord word;
    *word.mutable_hello() = hello(challenge->challenge().nonce(), words...);
    send(word);
    const auto answer = next();
    if (!answer || !answer->has_welcome()) return std::nullopt;
    return answer->welcome();
  }

 private:
  asio::io_context context_;
  tcp::socket socket_;
  ControlReader reader_;
};

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
    const auto welcome = peer.greet(1);
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
    EXPECT_FALSE(Peer(server_->address()).greet(0, other_secret));
    EXPECT_FALSE(Peer(server_->address()).greet(0, kSecret, other_job));
    EXPECT_FALSE(Peer(server_->address()).greet(2));
    EXPECT_FALSE(Peer(server_->address()).greet(-1));
    EXPECT_FALSE(Peer(server_->address()).greet(0, kSecret, kJob, 3));
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
    EXPECT_TRUE(Peer(server_->address()).greet(0));
  });
  run_until([&] { return !joined_.empty(); });
  EXPECT_GE(refused_.size(), 400u - 256u);
}

TEST_F(Control, ARankThatComesAgainTakesItsOwnPlaceAndNobodyElses) {
  with_server([&] {
    Peer first(server_->address());
    ASSERT_TRUE(first.greet(0));
    Peer again(server_->address());
    EXPECT_TRUE(again.greet(0));
    EXPECT_FALSE(first.next());  // the older connection is closed
    Peer other(server_->address());
    EXPECT_FALSE(other.greet(0, kSecret, kJob, 2, /*pid=*/101));
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
    ASSERT_TRUE(old.greet(0));
    asio::post(context_, [&] { server_->expect(next_job, 1, 6); });
    EXPECT_FALSE(old.next());
    EXPECT_FALSE(Peer(server_->address()).greet(0));
    next.emplace(server_->address());
    const auto welcome = next->greet(0, kSecret, next_job, 1);
    ASSERT_TRUE(welcome);
    EXPECT_EQ(welcome->generation(), 6);
  });
  EXPECT_EQ(closed_, std::vector<int>{});
}

TEST_F(Control, OrdersReachTheRankTheyAreFor) {
  with_server([&] {
    Peer one(server_->address());
    ASSERT_TRUE(one.greet(1));
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
