#pragma once
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/steady_timer.hpp>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <string>

#include "runtime/control.pb.h"

namespace moemamba {

// Throws BadSettings where nothing can listen on the address, or it is all of them.
void check_control_address(const std::string& address);

// Where the ranks of the present attempt connect to (docs/control_protocol.md). A connection that
// has not proven within five seconds that it is one of them is closed, as one that sends anything
// else than words.
class ControlServer {
 public:
  struct Options {
    std::string address;  // to bind; never all of them
    std::string secret;
    double fence_seconds = 10, heartbeat_seconds = 0.25;
  };
  struct Events {  // called from the context
    std::function<void(const Hello& hello, const std::string& address)> joined;
    std::function<void(int rank, const ControlWord& word)> said;
    std::function<void(int rank)> closed;             // and no later one has taken its place
    std::function<void(const std::string&)> refused;  // why
  };
  ControlServer(boost::asio::io_context& context, Options options, Events events);
  ~ControlServer();

  std::string address() const;  // "127.0.0.1:4711"
  // Ranks of this attempt are let in from now on, and nobody else; those of the one before are cut
  // off. generation: of the lease under which they may write.
  void expect(const std::string& job, int ranks, int64_t generation);
  bool connected(int rank) const { return ranks_.count(rank) > 0; }
  void send(int rank, const ControlWord& word);  // nothing, where it is not connected
  void send_all(const ControlWord& word);

 private:
  class Connection;
  void accept();
  void take(boost::asio::ip::tcp::socket socket);
  bool admit(const std::shared_ptr<Connection>& connection, const Hello& hello);
  void gone(const std::shared_ptr<Connection>& connection, const std::string& why);

  boost::asio::io_context& context_;
  Options options_;
  Events events_;
  boost::asio::ip::tcp::acceptor acceptor_;
  boost::asio::steady_timer pause_;
  std::string job_;
  int expected_ = 0;
  int64_t generation_ = 0;
  std::list<std::shared_ptr<Connection>> strangers_;  // oldest first
  std::map<int, std::shared_ptr<Connection>> ranks_;
};

}  // namespace moemamba
