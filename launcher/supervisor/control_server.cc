#include "launcher/supervisor/control_server.h"

#include <array>
#include <boost/asio/ip/address.hpp>
#include <boost/asio/write.hpp>
#include <deque>

#include "core/error.h"
#include "core/schema.h"
#include "runtime/control_wire.h"

namespace moemamba {

namespace {

namespace asio = boost::asio;
using asio::ip::tcp;
using boost::system::error_code;

constexpr auto kHandshake = std::chrono::seconds(5);
constexpr size_t kStrangers = 256;  // and one a rank: of more, the one that came first is cut off
constexpr size_t kMostUnsent = 1 << 18;                        // bytes, of one that does not read
constexpr auto kAcceptPause = std::chrono::milliseconds(100);  // where descriptors ran out

}  // namespace

// One connection; it lives as long as anything that it has begun.
class ControlServer::Connection : public std::enable_shared_from_this<Connection> {
 public:
  Connection(ControlServer& server, tcp::socket socket)
      : server_(&server),
        socket_(std::move(socket)),
        deadline_(server.context_),
        reader_(kMostGreetingBytes) {}

  void begin() {
    error_code ignored;
    socket_.set_option(tcp::no_delay(true), ignored);
    ControlWord word;
    challenge_ = make_challenge();
    *word.mutable_challenge() = challenge_;
    send(word);
    deadline_.expires_after(kHandshake);
    deadline_.async_wait([self = shared_from_this()](const error_code& error) {
      if (!error && self->rank_ < 0) self->close("it did not greet within 5 s");
    });
    read();
  }

  void send(const ControlWord& word) {
    if (!server_) return;
    if (unsent_.size() > kMostUnsent) return close("it does not read what it is sent");
    append_control_frame(word, unsent_);
    write();
  }

  // Why: for the log; empty: it had been let in, or ends as it should.
  void close(const std::string& why) {
    if (!server_) return;
    ControlServer* server = std::exchange(server_, nullptr);
    error_code ignored;
    socket_.close(ignored);
    deadline_.cancel();
    server->gone(shared_from_this(), why);
  }
  void forget() { server_ = nullptr; }

  int rank() const { return rank_; }
  int64_t pid() const { return pid_; }
  void shut() {
    error_code ignored;
    socket_.close(ignored);
    deadline_.cancel();
  }
  std::string peer() const {
    error_code ignored;
    return socket_.remote_endpoint(ignored).address().to_string();
  }

 private:
  void read() {
    socket_.async_read_some(asio::buffer(bytes_),
                            [self = shared_from_this()](const error_code& error, size_t got) {
                              if (!self->server_) return;
                              if (error) return self->close("");
                              try {
                                self->reader_.feed({self->bytes_.data(), got});
                                while (self->server_) {
                                  const auto word = self->reader_.next();
                                  if (!word) break;
                                  self->take(*word);
                                }
                              } catch (const Error& problem) {
                                return self->close(problem.what());
                              }
                              if (self->server_) self->read();
                            });
  }

  void take(const ControlWord& word) {
    if (rank_ < 0) return greet(word);
    if (word.has_heartbeat()) {
      ControlWord answer;
      answer.mutable_pulse()->set_number(word.heartbeat().number());
      answer.mutable_pulse()->set_generation(server_->generation_);
      send(answer);
    }
    if (server_ && server_->events_.said) server_->events_.said(rank_, word);
  }

  void greet(const ControlWord& word) {
    check(word.has_hello(), "its first word is no greeting");
    check_hello(word.hello(), server_->options_.secret, challenge_.nonce());
    const Hello& hello = word.hello();
    check(hello.job() == server_->job_, "it belongs to another attempt: ", hello.job());
    check(hello.rank() >= 0 && hello.rank() < server_->expected_ &&
              hello.ranks() == server_->expected_,
          "rank ", hello.rank(), " of ", hello.ranks(), ", expected one of ", server_->expected_);
    check(server_->admit(shared_from_this(), hello), "rank ", hello.rank(),
          " is connected already, as another process");
    deadline_.cancel();
    rank_ = hello.rank();
    pid_ = hello.pid();
    reader_.allow(kMostControlBytes);
    ControlWord answer;
    answer.mutable_welcome()->set_generation(server_->generation_);
    answer.mutable_welcome()->set_fence_seconds(server_->options_.fence_seconds);
    answer.mutable_welcome()->set_heartbeat_seconds(server_->options_.heartbeat_seconds);
    answer.mutable_welcome()->set_proof(supervisor_proof(server_->options_.secret, hello));
    send(answer);
    if (server_ && server_->events_.joined) server_->events_.joined(hello, peer());
  }

  void write() {
    if (writing_ || unsent_.empty()) return;
    writing_ = true;
    sent_ = std::exchange(unsent_, {});
    asio::async_write(socket_, asio::buffer(sent_),
                      [self = shared_from_this()](const error_code& error, size_t) {
                        self->writing_ = false;
                        if (error)
                          self->close("");
                        else if (self->server_)
                          self->write();
                      });
  }

  ControlServer* server_;  // null: it is closed
  tcp::socket socket_;
  asio::steady_timer deadline_;
  ControlReader reader_;
  Challenge challenge_;
  std::array<char, 8192> bytes_;
  std::string unsent_, sent_;
  bool writing_ = false;
  int rank_ = -1;
  int64_t pid_ = 0;
};

namespace {

tcp::acceptor bound(asio::io_context& context, const std::string& on) {
  error_code error;
  const asio::ip::address address = asio::ip::make_address(on, error);
  if (error || address.is_unspecified())
    throw BadSettings(concat("launch.control_address=", on,
                             ": expected an address of this machine, such as 127.0.0.1"));
  const tcp::endpoint endpoint(address, 0);
  tcp::acceptor acceptor(context);
  acceptor.open(endpoint.protocol());
  acceptor.bind(endpoint, error);
  if (error)
    throw BadSettings(concat("cannot listen on ", on, ": ", error.message(),
                             "; set launch.control_address to an address of this machine"));
  return acceptor;
}

}  // namespace

void check_control_address(const std::string& address) {
  asio::io_context context;
  bound(context, address);
}

ControlServer::ControlServer(asio::io_context& context, Options options, Events events)
    : context_(context),
      options_(std::move(options)),
      events_(std::move(events)),
      acceptor_(bound(context, options_.address)),
      pause_(context) {
  acceptor_.listen();
  accept();
}

ControlServer::~ControlServer() {
  for (const auto& stranger : strangers_) stranger->forget(), stranger->shut();
  for (const auto& [rank, connection] : ranks_) connection->forget(), connection->shut();
}

std::string ControlServer::address() const {
  const tcp::endpoint at = acceptor_.local_endpoint();
  const std::string host = at.address().to_string();
  return concat(at.address().is_v6() ? "[" + host + "]" : host, ":", at.port());
}

void ControlServer::accept() {
  acceptor_.async_accept([this](const error_code& error, tcp::socket socket) {
    if (error == asio::error::operation_aborted) return;
    if (!error) {
      take(std::move(socket));
      return accept();
    }
    pause_.expires_after(kAcceptPause);
    pause_.async_wait([this](const error_code& stopped) {
      if (!stopped) accept();
    });
  });
}

void ControlServer::take(tcp::socket socket) {
  if (strangers_.size() >= kStrangers + size_t(expected_)) {
    const auto oldest = strangers_.front();
    oldest->close("too many connections that do not greet");
  }
  strangers_.push_back(std::make_shared<Connection>(*this, std::move(socket)));
  const auto connection = strangers_.back();
  connection->begin();
}

// A rank that connects anew takes the place of its older connection.
bool ControlServer::admit(const std::shared_ptr<Connection>& connection, const Hello& hello) {
  const auto older = ranks_.find(hello.rank());
  if (older != ranks_.end()) {
    if (older->second->pid() != hello.pid()) return false;
    older->second->forget();
    older->second->shut();
    ranks_.erase(older);
  }
  strangers_.remove(connection);
  ranks_[hello.rank()] = connection;
  return true;
}

void ControlServer::gone(const std::shared_ptr<Connection>& connection, const std::string& why) {
  strangers_.remove(connection);
  const auto at = ranks_.find(connection->rank());
  const bool was_in = at != ranks_.end() && at->second == connection;
  if (was_in) ranks_.erase(at);
  if (!why.empty() && events_.refused) events_.refused(why);
  if (was_in && events_.closed) events_.closed(connection->rank());
}

void ControlServer::expect(const std::string& job, int ranks, int64_t generation) {
  job_ = job;
  expected_ = ranks;
  generation_ = generation;
  for (const auto& [rank, connection] : std::exchange(ranks_, {})) {
    connection->forget();
    connection->shut();
  }
}

void ControlServer::send(int rank, const ControlWord& word) {
  const auto at = ranks_.find(rank);
  if (at == ranks_.end()) return;
  const auto connection = at->second;  // sending may close it
  connection->send(word);
}

void ControlServer::send_all(const ControlWord& word) {
  for (int rank = 0; rank < expected_; ++rank) send(rank, word);
}

}  // namespace moemamba
