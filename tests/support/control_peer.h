#pragma once
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/write.hpp>
#include <chrono>
#include <optional>
#include <string>

#include "runtime/control_wire.h"

namespace moemamba {

// A rank's side of a control connection, on a blocking socket, which says what a test wants.
class ControlPeer {
 public:
  explicit ControlPeer(const std::string& address) : socket_(context_) {
    const size_t colon = address.rfind(':');
    socket_.connect({boost::asio::ip::make_address(address.substr(0, colon)),
                     static_cast<unsigned short>(std::stoi(address.substr(colon + 1)))});
  }
  void send(const ControlWord& word) {
    std::string frame;
    append_control_frame(word, frame);
    send_bytes(frame);
  }
  void send_bytes(const std::string& bytes) {
    boost::system::error_code ignored;  // it may have been closed
    boost::asio::write(socket_, boost::asio::buffer(bytes), ignored);
  }
  // Nothing: the connection was closed.
  std::optional<ControlWord> next() {
    for (;;) {
      if (auto word = reader_.next()) return word;
      char bytes[4096];
      boost::system::error_code error;
      const size_t got = socket_.read_some(boost::asio::buffer(bytes), error);
      if (error) return std::nullopt;
      reader_.feed({bytes, got});
    }
  }
  // Answers the challenge; returns the Welcome, or nothing where it was refused. An Error where the
  // server does not know the secret.
  std::optional<Welcome> greet(Hello hello, const std::string& secret) {
    const auto challenge = next();
    if (!challenge || !challenge->has_challenge()) return std::nullopt;
    hello.set_protocol(kControlProtocol);
    hello.set_proof(
        control_proof(secret, challenge->challenge().nonce(), hello.job(), hello.rank()));
    hello.set_nonce(make_challenge().nonce());
    ControlWord word;
    *word.mutable_hello() = hello;
    send(word);
    const auto answer = next();
    if (!answer || !answer->has_welcome()) return std::nullopt;
    check_welcome(answer->welcome(), secret, hello);
    return answer->welcome();
  }

 private:
  boost::asio::io_context context_;
  boost::asio::ip::tcp::socket socket_;
  ControlReader reader_;
};

}  // namespace moemamba
