#pragma once
#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <chrono>
#include <functional>
#include <memory>

namespace moemamba {

// Calls one thing, once, later: what it was set to last, unless it was cancelled or destroyed. (A
// bare timer may still call what had run out before it was cancelled.)
class Alarm {
 public:
  explicit Alarm(boost::asio::io_context& context) : timer_(context) {}
  ~Alarm() { cancel(); }
  Alarm(const Alarm&) = delete;
  Alarm& operator=(const Alarm&) = delete;

  void set(double seconds, std::function<void()> act) {
    act_ = std::make_shared<std::function<void()>>(std::move(act));
    timer_.expires_after(std::chrono::duration_cast<std::chrono::steady_clock::duration>(
        std::chrono::duration<double>(seconds)));
    timer_.async_wait([waiting = std::weak_ptr(act_)](const boost::system::error_code& error) {
      const auto due = waiting.lock();
      if (!due || error) return;
      const std::function<void()> act = std::move(*due);  // it may set the alarm anew
      act();
    });
  }
  void cancel() {
    act_.reset();
    timer_.cancel();
  }

 private:
  boost::asio::steady_timer timer_;
  std::shared_ptr<std::function<void()>> act_;
};

}  // namespace moemamba
