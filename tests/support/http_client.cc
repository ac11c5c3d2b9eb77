#include "tests/support/http_client.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>

#include "core/error.h"

namespace moemamba {

using Clock = std::chrono::steady_clock;

HttpClient::HttpClient(int port, int receive_buffer) : socket_(socket(AF_INET, SOCK_STREAM, 0)) {
  if (receive_buffer > 0)
    setsockopt(socket_, SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof receive_buffer);
  sockaddr_in to{};
  to.sin_family = AF_INET;
  to.sin_port = htons(uint16_t(port));
  to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  check(connect(socket_, reinterpret_cast<sockaddr*>(&to), sizeof to) == 0,
        "no connection to port ", port);
}

HttpClient::HttpClient(HttpClient&& other) noexcept
    : socket_(std::exchange(other.socket_, -1)), bytes_(std::move(other.bytes_)) {}

HttpClient::~HttpClient() {
  if (socket_ >= 0) close(socket_);
}

bool HttpClient::send(const std::string& bytes) {
  for (size_t at = 0; at < bytes.size();) {
    const ssize_t sent = ::send(socket_, bytes.data() + at, bytes.size() - at, MSG_NOSIGNAL);
    if (sent <= 0) return false;
    at += size_t(sent);
  }
  return true;
}

HttpClient::Came HttpClient::receive(std::chrono::milliseconds most) {
  pollfd waits{.fd = socket_, .events = POLLIN, .revents = 0};
  if (poll(&waits, 1, int(std::max<int64_t>(0, most.count()))) <= 0) return Came::nothing;
  char some[65536];
  const ssize_t got = recv(socket_, some, sizeof some, 0);
  if (got <= 0) return Came::end;  // closed, or reset
  bytes_.append(some, size_t(got));
  return Came::bytes;
}

std::optional<std::string> HttpClient::read_all(std::chrono::seconds most) {
  const auto until = Clock::now() + most;
  for (;;) {
    const Came came =
        receive(std::chrono::duration_cast<std::chrono::milliseconds>(until - Clock::now()));
    if (came == Came::nothing) return std::nullopt;
    if (came == Came::end) return std::exchange(bytes_, "");
  }
}

std::string HttpClient::read_answer() {
  for (;;) {
    const size_t header = bytes_.find("\r\n\r\n");
    if (header != std::string::npos) {
      const size_t size = header + 4 + std::stoul(http_field(bytes_, "Content-Length"));
      if (bytes_.size() >= size) {
        std::string answer = bytes_.substr(0, size);
        bytes_.erase(0, size);
        return answer;
      }
    }
    if (receive(std::chrono::seconds(60)) != Came::bytes) return std::exchange(bytes_, "");
  }
}

bool HttpClient::closed(std::chrono::milliseconds most) {
  const auto until = Clock::now() + most;
  for (;;) {
    const Came came =
        receive(std::chrono::duration_cast<std::chrono::milliseconds>(until - Clock::now()));
    if (came != Came::bytes) return came == Came::end;
  }
}

std::string http_get(int port, const std::string& target, const std::string& fields) {
  HttpClient client(port);
  client.send("GET " + target + " HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + fields +
              "\r\n");
  return client.read_all().value_or("");
}

int http_status(const std::string& answer) {
  return answer.starts_with("HTTP/1.1 ") ? std::stoi(answer.substr(9, 3)) : 0;
}

std::string http_body(const std::string& answer) {
  const size_t header = answer.find("\r\n\r\n");
  return header == std::string::npos ? "" : answer.substr(header + 4);
}

std::string http_field(const std::string& answer, const std::string& name) {
  const size_t at = answer.find("\r\n" + name + ": ");
  if (at == std::string::npos || at > answer.find("\r\n\r\n")) return "";
  const size_t begin = at + name.size() + 4;
  return answer.substr(begin, answer.find("\r\n", begin) - begin);
}

}  // namespace moemamba
