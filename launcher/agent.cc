#include "launcher/agent.h"

#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/write.hpp>
#include <cerrno>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <deque>
#include <optional>
#include <thread>

#include "core/digest.h"
#include "core/error.h"
#include "launcher/agent_outbox.h"
#include "launcher/agent_parts.h"
#include "launcher/launch.h"
#include "launcher/thread_stack.h"
#include "runtime/control_wire.h"

namespace moemamba {

namespace {

namespace asio = boost::asio;
using asio::ip::tcp;
using boost::system::error_code;

constexpr double kTick = 0.25;        // seconds, at most
constexpr double kLookup = 0.005;     // of the address, which takes no longer as a rule
constexpr double kReconnect = 0.3;    // between two tries
constexpr double kStackPatience = 1;  // for the thread that trains to answer
constexpr auto kGoodbye = std::chrono::seconds(2);
constexpr auto kBetweenWakes = std::chrono::milliseconds(50);
constexpr size_t kMostText = 8192;  // of an event or a goodbye

}  // namespace

// All below runs on the agent's thread, but for what is said to be shared.
class Agent::Inner {
 public:
  explicit Inner(Options options);
  ~Inner();

  // Shared.
  Activity activity;
  AgentOutbox outbox;
  std::atomic<int64_t> generation{0}, gpu_bytes{0};
  void wait_welcome();
  void wake();  // the outbox has something that should not wait for the next tick; no allocation
  void wake_now_and_then();  // from one thread alone
  void say_goodbye(Goodbye::Reason reason, const std::string& text);

 private:
  enum class At { nowhere, connecting, greeting, in };

  void tick();
  void tick_after(double seconds);
  void listen();
  bool over();
  void look_around();
  void connect(const tcp::endpoint& endpoint);
  void drop();
  void read();
  void take(const ControlWord& word);
  void greet(const Challenge& challenge);
  void welcome(const Welcome& word);
  void obey(const Order& order);
  void send_stack();
  void beat();
  void send(const ControlWord& word);
  void write();
  void finish();
  void say(const std::string& text) const;
  void end(const std::string& why);
  // A handler of what the connection at hand has begun; nothing where that is gone, or all is over.
  // The fence is looked at before anything else: this process may have slept.
  template <class Body>
  auto guarded(Body body) {
    return [this, body, connection = connection_](const error_code& error, auto... rest) {
      if (!over() && connection == connection_) body(error, rest...);
    };
  }

  Options options_;
  std::string secret_;
  Hello hello_;
  ThreadStack stack_;

  asio::io_context context_;
  asio::steady_timer tick_{context_}, stack_timer_{context_};
  asio::posix::stream_descriptor wakes_{context_};
  std::chrono::steady_clock::time_point woken_{};  // by wake_now_and_then
  tcp::socket socket_{context_};
  std::optional<AddressLookup> lookup_;
  uint64_t connection_ = 0;  // number of the one at hand
  At at_ = At::nowhere;
  ControlReader reader_;
  std::array<char, 4096> bytes_;
  std::string unsent_, in_flight_;  // frames
  // Events and the like that were sent, with the number of the heartbeat behind them: once that is
  // answered, they have been heard. Else they are sent again.
  std::deque<std::pair<uint64_t, ControlWord>> unheard_;
  bool writing_ = false, saying_goodbye_ = false, complained_ = false;

  // Seconds of the clock above.
  double fence_, heartbeat_ = kTick;
  double alive_;  // when that was sent which the supervisor answered last
  double heard_ = 0, tried_ = 0, beat_ = 0;  // the latest word; connection; heartbeat
  double stack_asked_ = 0;
  uint64_t number_ = 0;               // of the latest heartbeat
  std::array<double, 1024> beats_{};  // when they were sent, by number
  bool over_ = false;                 // fenced, ended, or said goodbye

  std::mutex mutex_;
  std::condition_variable changed_;
  bool welcomed_ = false, finished_ = false;
  std::thread thread_;
};

Agent::Inner::Inner(Options options)
    : outbox(options.rank == 0),
      options_(std::move(options)),
      secret_(read_secret(options_.folder)),
      fence_(options_.fence_seconds),
      alive_(boot_seconds()) {
  if (!options_.exit) options_.exit = [](int code) { _exit(code); };
  hello_ = hello_of_this_process();
  hello_.set_job(options_.job);
  hello_.set_rank(options_.rank);
  hello_.set_ranks(options_.ranks);
  hello_.set_gpu(options_.gpu);
  const int wakes = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  check(wakes >= 0, "eventfd: ", std::strerror(errno));
  wakes_.assign(wakes);
  thread_ = quiet_thread([this] {
    listen();
    asio::post(context_, [this] { tick(); });
    for (bool runs = true; runs;) {
      try {
        context_.run();
        runs = false;
      } catch (const std::exception& error) {  // of memory or threads: the next tick tries again
        if (!std::exchange(complained_, true)) say(error.what());
      }
    }
  });
}

Agent::Inner::~Inner() {
  asio::post(context_, [this] {
    over_ = true;
    context_.stop();
  });
  thread_.join();
}

void Agent::Inner::wake() {
  const uint64_t one = 1;
  if (::write(wakes_.native_handle(), &one, sizeof one) < 0) return;  // it is awake
}

// Often enough for people, seldom enough for steps of a millisecond.
void Agent::Inner::wake_now_and_then() {
  const auto now = std::chrono::steady_clock::now();
  if (now - woken_ < kBetweenWakes) return;
  woken_ = now;
  wake();
}

void Agent::Inner::listen() {
  wakes_.async_wait(asio::posix::stream_descriptor::wait_read, [this](const error_code& error) {
    if (error || over()) return;
    uint64_t times = 0;
    if (::read(wakes_.native_handle(), &times, sizeof times) < 0) times = 0;
    listen();
    if (at_ == At::in) write();
  });
}

void Agent::Inner::wait_welcome() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return welcomed_ || finished_; });
}

void Agent::Inner::say_goodbye(Goodbye::Reason reason, const std::string& text) {
  ControlWord word;
  word.mutable_goodbye()->set_reason(reason);
  word.mutable_goodbye()->set_text(text.substr(0, kMostText));
  asio::post(context_, [this, word = std::move(word)]() mutable {
    outbox.add(std::move(word));
    saying_goodbye_ = true;
    if (at_ == At::in && !over()) write();
  });
  std::unique_lock lock(mutex_);
  if (changed_.wait_for(lock, kGoodbye, [this] { return finished_; })) return;
  asio::post(context_, [this] { finish(); });  // it may be gone as well
}

// The end of all words, whatever the reason.
void Agent::Inner::finish() {
  over_ = true;
  error_code ignored;
  socket_.close(ignored);
  wakes_.cancel(ignored);
  {
    const std::lock_guard lock(mutex_);
    finished_ = true;
  }
  changed_.notify_all();
}

void Agent::Inner::say(const std::string& text) const {
  const std::string line = concat("moemamba: rank ", options_.rank, ": ", text, "\n");
  pollfd reader{.fd = STDERR_FILENO, .events = POLLOUT, .revents = 0};
  if (poll(&reader, 1, 0) != 1) return;  // a reader that is stopped must not stop the fence
  if (::write(STDERR_FILENO, line.data(), line.size()) < 0) return;  // nobody listens
}

void Agent::Inner::end(const std::string& why) {
  say(why);
  finish();
  options_.exit(kExitRestart);
}

// Whether nothing may be done any more. A rank that its supervisor has not answered for so long may
// have been replaced.
bool Agent::Inner::over() {
  const double silent = boot_seconds() - alive_;
  if (!over_ && silent >= fence_) {
    char seconds[32];
    std::snprintf(seconds, sizeof seconds, "%.1f", silent);
    end_daemon();
    end(concat("nothing heard from the supervisor of this run for ", seconds,
               " s (launch.fence_seconds): this rank ends itself"));
  }
  return over_;
}

void Agent::Inner::tick() {
  if (over()) return;
  tick_after(std::min(kTick, heartbeat_));
  look_around();
  if (lookup_) tick_after(kLookup);
  if (at_ != At::in) return;
  if (boot_seconds() - beat_ >= heartbeat_ * 0.99) beat();
  write();
}

void Agent::Inner::tick_after(double seconds) {
  tick_.expires_after(std::chrono::nanoseconds(int64_t(seconds * 1e9)));
  tick_.async_wait([this](const error_code& error) {
    if (!error) tick();
  });
}

// Connects where there is no connection, and leaves one that is silent: its other side may be gone
// without a word.
void Agent::Inner::look_around() {
  const double now = boot_seconds();
  const double patience =
      std::min(std::max(2.0, 3 * heartbeat_), std::max(fence_ / 2, 2 * heartbeat_));
  if (at_ != At::nowhere && now - heard_ > patience) drop();
  if (at_ != At::nowhere) return;
  if (!lookup_) {
    if (now - tried_ < kReconnect) return;
    tried_ = now;
    lookup_.emplace(options_.folder + "/address");
    return;
  }
  if (!lookup_->done()) return;
  const auto endpoint = endpoint_of(lookup_->text());
  lookup_.reset();
  if (endpoint) connect(*endpoint);
}

void Agent::Inner::connect(const tcp::endpoint& endpoint) {
  at_ = At::connecting;
  heard_ = boot_seconds();
  reader_ = ControlReader(kMostGreetingBytes);
  hello_.clear_nonce();
  socket_ = tcp::socket(context_);
  socket_.async_connect(endpoint, guarded([this](const error_code& error) {
                          if (error) return drop();
                          error_code ignored;
                          socket_.set_option(tcp::no_delay(true), ignored);
                          at_ = At::greeting;
                          read();
                        }));
}

void Agent::Inner::drop() {
  ++connection_;
  error_code ignored;
  socket_.close(ignored);
  at_ = At::nowhere;
  writing_ = false;
  unsent_.clear();
  std::vector<ControlWord> words;
  for (auto& [number, word] : unheard_) words.push_back(std::move(word));
  unheard_.clear();
  outbox.give_back(std::move(words));
}

void Agent::Inner::read() {
  socket_.async_read_some(asio::buffer(bytes_),
                          guarded([this](const error_code& error, size_t got) {
                            const bool said_all = saying_goodbye_ && outbox.empty() && !writing_;
                            if (error) return said_all ? finish() : drop();
                            const uint64_t connection = connection_;
                            try {
                              reader_.feed({bytes_.data(), got});
                              while (!over_ && connection == connection_) {
                                const auto word = reader_.next();
                                if (!word) break;
                                take(*word);
                              }
                            } catch (const std::exception& problem) {
                              if (!std::exchange(complained_, true)) say(problem.what());
                              return drop();
                            }
                            if (!over_ && connection == connection_) read();
                          }));
}

// Who has not proven to be the supervisor is not obeyed: when that died, anybody may listen at its
// address.
void Agent::Inner::take(const ControlWord& word) {
  if (at_ != At::in && !word.has_challenge() && !word.has_welcome()) return;
  heard_ = boot_seconds();
  switch (word.word_case()) {
    case ControlWord::kChallenge:
      return greet(word.challenge());
    case ControlWord::kWelcome:
      return welcome(word.welcome());
    case ControlWord::kOrder:
      return obey(word.order());
    case ControlWord::kPulse:
      if (word.pulse().number() > number_ || number_ - word.pulse().number() >= beats_.size())
        return;
      alive_ = std::max(alive_, beats_[word.pulse().number() % beats_.size()]);
      generation = word.pulse().generation();
      while (!unheard_.empty() && unheard_.front().first <= word.pulse().number())
        unheard_.pop_front();
      return;
    default:
      return;  // of no meaning to a rank
  }
}

void Agent::Inner::greet(const Challenge& challenge) {
  check_challenge(challenge);
  check(at_ == At::greeting && !hello_.has_nonce(), "the supervisor challenges this rank twice");
  hello_.set_nonce(random_bytes(kNonceBytes));
  ControlWord word;
  *word.mutable_hello() = hello_;
  word.mutable_hello()->set_proof(
      control_proof(secret_, challenge.nonce(), hello_.job(), hello_.rank()));
  send(word);
  beat_ = boot_seconds();  // the Welcome answers it
  write();
}

void Agent::Inner::welcome(const Welcome& word) {
  if (at_ != At::greeting) return;
  check_welcome(word, secret_, hello_);
  reader_.allow(kMostControlBytes);
  at_ = At::in;
  alive_ = std::max(alive_, beat_);
  generation = word.generation();
  if (word.fence_seconds() > 0) fence_ = word.fence_seconds();
  if (word.heartbeat_seconds() > 0) heartbeat_ = word.heartbeat_seconds();
  {
    const std::lock_guard lock(mutex_);
    welcomed_ = true;
  }
  changed_.notify_all();
  beat();
  write();
}

void Agent::Inner::obey(const Order& order) {
  switch (order.what()) {
    case Order::STOP:
      if (options_.stop) options_.stop();
      return;
    case Order::END:
      return end("ended by its supervisor");  // which says why
    case Order::SEND_STACK:
      stack_asked_ = boot_seconds();
      stack_.ask();
      return send_stack();
  }
}

// Looks for the answer every few milliseconds, so that nobody waits in between.
void Agent::Inner::send_stack() {
  std::optional<std::vector<std::string>> frames = stack_.answer();
  if (!frames && boot_seconds() - stack_asked_ < kStackPatience) {
    stack_timer_.expires_after(std::chrono::milliseconds(5));
    stack_timer_.async_wait([this](const error_code& error) {
      if (!error && !over()) send_stack();
    });
    return;
  }
  ControlWord word;
  if (frames)
    for (std::string& frame : *frames) word.mutable_stack()->add_frames(frame.substr(0, 512));
  else
    word.mutable_stack()->add_frames("the thread that trains takes no signal; its state: " +
                                     stack_.kernel_state());
  outbox.add(std::move(word));
  if (at_ == At::in) write();
}

void Agent::Inner::beat() {
  const ControlWord word = heartbeat_word(++number_, activity.now(), gpu_bytes);
  beat_ = boot_seconds();
  beats_[number_ % beats_.size()] = beat_;
  if (unsent_.size() < kMostControlBytes) send(word);  // else nobody reads them
}

void Agent::Inner::send(const ControlWord& word) {
  append_control_frame(word, unsent_);
}

void Agent::Inner::write() {
  if (writing_) return;
  if (at_ == At::in) {
    for (ControlWord& word : outbox.take()) {
      send(word);
      if (AgentOutbox::is_kept(word)) unheard_.emplace_back(number_ + 1, std::move(word));
    }
  }
  if (unsent_.empty()) return;
  writing_ = true;
  in_flight_ = std::exchange(unsent_, {});
  asio::async_write(socket_, asio::buffer(in_flight_),
                    guarded([this](const error_code& error, size_t) {
                      writing_ = false;
                      if (error) return drop();
                      if (!outbox.empty() || !unsent_.empty()) return write();
                      error_code ignored;  // then the supervisor closes, and read() finishes
                      if (saying_goodbye_) socket_.shutdown(tcp::socket::shutdown_send, ignored);
                    }));
}

Agent::Agent(Options options) : inner_(std::make_unique<Inner>(std::move(options))) {}

Agent::~Agent() = default;

void Agent::wait_welcome() {
  inner_->wait_welcome();
}

int64_t Agent::generation() const {
  return inner_->generation;
}

Activity& Agent::activity() {
  return inner_->activity;
}

void Agent::report(const Step& step) {
  inner_->outbox.add(step);
  inner_->wake_now_and_then();
}

void Agent::report_choices(int64_t step, int64_t experts, const std::vector<double>& choices,
                           int64_t dropped_rows) {
  inner_->outbox.add_choices(step, experts, choices, dropped_rows);
}

void Agent::set_gpu_bytes(int64_t bytes) {
  inner_->gpu_bytes = bytes;
}

void Agent::note(const RunEvent& event) {
  ControlWord word;
  *word.mutable_event() = event;
  if (event.text().size() > kMostText)
    word.mutable_event()->set_text(event.text().substr(0, kMostText));
  inner_->outbox.add(std::move(word));
  inner_->wake();
}

void Agent::say_goodbye(Goodbye::Reason reason, const std::string& text) {
  inner_->say_goodbye(reason, text);
}

}  // namespace moemamba
