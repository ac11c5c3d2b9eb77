#include "launcher/supervisor/status_server.h"

#include <array>
#include <boost/asio/buffer.hpp>
#include <boost/asio/ip/address.hpp>
#include <boost/asio/ip/host_name.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/write.hpp>
#include <condition_variable>
#include <list>
#include <optional>
#include <thread>

#include "core/error.h"
#include "core/schema.h"
#include "launcher/supervisor/status_answers.h"

namespace moemamba {

namespace {

namespace asio = boost::asio;
using asio::ip::tcp;
using boost::system::error_code;

constexpr auto kPollEvery = std::chrono::milliseconds(500);
constexpr auto kPollAgain = std::chrono::milliseconds(20);  // amid a long file
constexpr auto kAcceptPause = std::chrono::milliseconds(100);
constexpr auto kLastBytes = std::chrono::seconds(1);  // of one whose request was refused
constexpr auto kLately = std::chrono::seconds(10);
constexpr size_t kMostLastBytes = 1 << 16;
constexpr int kSendBuffer = 1 << 16;  // what the system keeps of an answer that is not read

std::chrono::steady_clock::duration duration(double seconds) {
  return std::chrono::duration_cast<std::chrono::steady_clock::duration>(
      std::chrono::duration<double>(seconds));
}

// Of programs of this machine alone.
bool is_private(const asio::ip::address& address) {
  return address.is_loopback() && (address.is_v6() || address == asio::ip::address_v4::loopback());
}

// Reads the run's files on a thread of its own, for a disk may take its time.
class RecordsThread {
 public:
  explicit RecordsThread(RunRecords& records) : thread_([this, &records] { follow(records); }) {}
  ~RecordsThread() {
    {
      const std::lock_guard lock(mutex_);
      ends_ = true;
    }
    wake_.notify_all();
    thread_.join();
  }

 private:
  void follow(RunRecords& records) {
    std::unique_lock lock(mutex_);
    while (!ends_) {
      lock.unlock();
      const bool more = records.poll();
      lock.lock();
      wake_.wait_for(lock, more ? kPollAgain : kPollEvery, [this] { return ends_; });
    }
  }
  std::mutex mutex_;
  std::condition_variable wake_;
  bool ends_ = false;
  std::thread thread_;
};

}  // namespace

struct StatusServer::State : std::enable_shared_from_this<State> {
  class Connection;
  State(asio::io_context& context, StatusOptions options, const RunView& view,
        std::function<double()> now);
  void listen();
  void accept();
  void take(tcp::socket socket);
  void gone(const std::shared_ptr<Connection>& connection) { connections.remove(connection); }
  void waits_anew(const std::shared_ptr<Connection>& connection);

  asio::io_context& context;
  const StatusOptions options;
  RunRecords records;
  StatusAnswers answers;
  StatusCounts counts;
  std::optional<std::chrono::steady_clock::time_point> asked;  // the latest request
  tcp::acceptor acceptor;
  asio::steady_timer pause;
  std::list<std::shared_ptr<Connection>> connections;  // the one that waits longest first
  RecordsThread thread;
};

// One connection; it lives as long as anything that it has begun. What it keeps is the present
// request's header and an answer that all who ask share.
class StatusServer::State::Connection : public std::enable_shared_from_this<Connection> {
 public:
  Connection(State& server, tcp::socket socket)
      : server_(&server), socket_(std::move(socket)), deadline_(server.context) {}

  void begin() {
    error_code ignored;
    socket_.set_option(tcp::no_delay(true), ignored);
    socket_.set_option(asio::socket_base::send_buffer_size(kSendBuffer), ignored);
    expect_request();
  }

  bool answering() const { return answering_; }

  // `counted`: it was too slow, or one too many.
  void close(bool counted) {
    if (!server_) return;
    State* server = std::exchange(server_, nullptr);
    if (counted) ++server->counts.cut_off;
    shut();
    server->gone(shared_from_this());
  }
  void forget() {  // the server ends
    server_ = nullptr;
    shut();
  }

 private:
  void shut() {
    error_code ignored;
    socket_.close(ignored);
    deadline_.cancel();
  }

  // One deadline for all that is done until the next call: no byte that trickles in moves it.
  void expect_within(std::chrono::steady_clock::duration time, bool counted) {
    deadline_.expires_after(time);
    deadline_.async_wait(
        [self = shared_from_this(), due = ++deadlines_, counted](error_code error) {
          if (!error && due == self->deadlines_) self->close(counted);
        });
  }

  void expect_request() {
    answering_ = false;
    reader_ = RequestReader();
    // One that has said nothing after an answer is a browser that may come back, or not.
    expect_within(duration(server_->options.header_seconds), !answered_);
    feed();
  }

  // What has come already, then what comes.
  void feed() {
    const size_t taken = reader_.feed({bytes_.data() + begin_, end_ - begin_});
    begin_ += taken;
    if (reader_.done()) return answer();
    read();
  }

  void read() {
    socket_.async_read_some(asio::buffer(bytes_),
                            [self = shared_from_this()](error_code error, size_t got) {
                              if (!self->server_) return;
                              if (error) return self->close(false);
                              self->begin_ = 0;
                              self->end_ = got;
                              self->feed();
                            });
  }

  void answer() {
    answering_ = answered_ = true;
    server_->asked = std::chrono::steady_clock::now();
    const HttpRequest* request = std::get_if<HttpRequest>(&reader_.result());
    answer_ = request ? server_->answers.answer(*request, server_->counts)
                      : std::get<HttpAnswer>(reader_.result());
    keep_ = request && request->keep_alive && answer_.status < 400;
    ++(answer_.status < 400 ? server_->counts.answered : server_->counts.refused);
    header_ = header_of(answer_, keep_);
    const bool head = request && request->head;
    const std::array<asio::const_buffer, 2> parts = {
        asio::buffer(header_), head ? asio::const_buffer() : asio::buffer(*answer_.body)};
    expect_within(duration(server_->options.answer_seconds), true);
    asio::async_write(socket_, parts, [self = shared_from_this()](error_code error, size_t) {
      if (!self->server_) return;
      if (error) return self->close(false);
      self->answer_.body.reset();
      if (!self->keep_) return self->end();
      self->server_->waits_anew(self);
      self->expect_request();
    });
  }

  // Closing with bytes unread would take the answer from one who still sends.
  void end() {
    error_code error;
    socket_.shutdown(tcp::socket::shutdown_send, error);
    if (error) return close(false);
    expect_within(kLastBytes, false);
    drain(kMostLastBytes);
  }
  void drain(size_t left) {
    socket_.async_read_some(asio::buffer(bytes_),
                            [self = shared_from_this(), left](error_code error, size_t got) {
                              if (!self->server_) return;
                              if (error || got >= left) return self->close(false);
                              self->drain(left - got);
                            });
  }

  State* server_;  // null: it is closed
  tcp::socket socket_;
  asio::steady_timer deadline_;
  int64_t deadlines_ = 0;
  RequestReader reader_;
  std::array<char, 4096> bytes_;
  size_t begin_ = 0, end_ = 0;  // of bytes_: what came and was not taken
  HttpAnswer answer_;
  std::string header_;
  bool keep_ = false, answering_ = false, answered_ = false;
};

StatusServer::State::State(asio::io_context& context_, StatusOptions options_, const RunView& view,
                           std::function<double()> now)
    : context(context_),
      options(std::move(options_)),
      records(options.run),
      answers(view, records, std::move(now),
              {.token = options.token, .loopback = options.token.empty()}),
      acceptor(context),
      pause(context),
      thread(records) {
  listen();
}

void StatusServer::State::listen() {
  error_code error;
  const asio::ip::address address = asio::ip::make_address(options.address, error);
  check(!error, "launch.status_address=", options.address,
        ": expected a numeric address, such as 127.0.0.1 or 0.0.0.0");
  check(is_private(address) || !options.token.empty(), "launch.status_address=", options.address,
        ": others can reach it, so that requests need a token: set launch.status_token_file");
  const tcp::endpoint endpoint(address, uint16_t(options.port));
  acceptor.open(endpoint.protocol());
  acceptor.set_option(tcp::acceptor::reuse_address(true), error);
  acceptor.bind(endpoint, error);
  if (error)
    throw BadSettings(concat("cannot listen on ", options.address, " port ", options.port, ": ",
                             error.message(),
                             "; choose another launch.status_port, or 0 for any that is free"));
  acceptor.listen(asio::socket_base::max_listen_connections, error);
  check(!error, "cannot listen on ", options.address, " port ", options.port, ": ",
        error.message());
}

void StatusServer::State::accept() {
  acceptor.async_accept([weak = weak_from_this()](error_code error, tcp::socket socket) {
    const auto self = weak.lock();
    if (!self || !self->acceptor.is_open()) return;
    if (!error) {
      self->take(std::move(socket));
      return self->accept();
    }
    self->pause.expires_after(kAcceptPause);  // descriptors ran out
    self->pause.async_wait([weak](error_code) {
      const auto self = weak.lock();
      if (self && self->acceptor.is_open()) self->accept();
    });
  });
}

// Whoever connects gets in: of those who are in, the one that waits longest without a request goes,
// or takes longest to read its answer. A request that comes in one piece is answered long before.
void StatusServer::State::take(tcp::socket socket) {
  if (connections.size() >= options.connections) {
    auto slow = connections.begin();
    while (slow != connections.end() && (*slow)->answering()) ++slow;
    const auto cut = slow == connections.end() ? connections.front() : *slow;
    cut->close(true);
  }
  connections.push_back(std::make_shared<Connection>(*this, std::move(socket)));
  const auto connection = connections.back();
  connection->begin();
}

void StatusServer::State::waits_anew(const std::shared_ptr<Connection>& connection) {
  connections.remove(connection);
  connections.push_back(connection);
}

StatusServer::StatusServer(asio::io_context& context, StatusOptions options, const RunView& view,
                           std::function<double()> now)
    : state_(std::make_shared<State>(context, std::move(options), view, std::move(now))) {
  state_->accept();
}

StatusServer::~StatusServer() {
  for (const auto& connection : state_->connections) connection->forget();
  error_code ignored;
  state_->acceptor.close(ignored);
}

int StatusServer::port() const {
  return state_->acceptor.local_endpoint().port();
}

bool StatusServer::asked_lately() const {
  return state_->asked && std::chrono::steady_clock::now() - *state_->asked < kLately;
}

std::string StatusServer::url() const {
  const tcp::endpoint at = state_->acceptor.local_endpoint();
  const std::string host =
      at.address().is_unspecified() ? asio::ip::host_name() : at.address().to_string();
  return concat("http://", host.find(':') != std::string::npos ? "[" + host + "]" : host, ":",
                at.port(), "/");
}

}  // namespace moemamba
