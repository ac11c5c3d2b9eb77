#pragma once
#include <atomic>
#include <boost/asio/ip/tcp.hpp>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>

#include "core/activity.h"
#include "runtime/control.pb.h"

namespace moemamba {

// Parts of an agent (agent.cc) that do not talk.

// Goes on while the machine sleeps, and when this process is stopped.
double boot_seconds();

// "127.0.0.1:4711" or "[::1]:4711"; nothing else.
std::optional<boost::asio::ip::tcp::endpoint> endpoint_of(const std::string& text);

// Reads the supervisor's address on a thread of its own: a disk that hangs must not keep the agent
// from ending its process.
class AddressLookup {
 public:
  explicit AddressLookup(const std::string& path);
  bool done() const { return found_->done; }
  const std::string& text() const { return found_->text; }  // REQUIRES: done

 private:
  struct Found {
    std::string text;
    std::atomic<bool> done = false;
  };
  std::shared_ptr<Found> found_;
};

// A thread that takes none of the process's signals, which are for the others.
std::thread quiet_thread(std::function<void()> body);

Hello hello_of_this_process();  // without job, rank and proof
ControlWord heartbeat_word(uint64_t number, const Activity::Now& now, int64_t gpu_bytes);

}  // namespace moemamba
