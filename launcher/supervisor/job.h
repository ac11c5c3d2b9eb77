#pragma once
#include <sys/types.h>

#include <boost/asio/io_context.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/steady_timer.hpp>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace moemamba {

// Calls `ended` once, from the context, when a process has ended; it need not be a child. One that
// is gone already, or whose number means another process by now, has ended.
class ProcessEnd {
 public:
  ProcessEnd(boost::asio::io_context& context, pid_t pid, int64_t started,
             std::function<void()> ended);
  ~ProcessEnd();
  ProcessEnd(const ProcessEnd&) = delete;
  ProcessEnd& operator=(const ProcessEnd&) = delete;

 private:
  void poll();
  void end();
  pid_t pid_;
  int64_t started_;
  std::function<void()> ended_;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);  // this object
  boost::asio::posix::stream_descriptor descriptor_;
  boost::asio::steady_timer timer_;  // where the kernel has no descriptors of processes
};

// The process that starts the ranks (mpirun, srun) and ends with them. It is in a session of its
// own and prints into a file, so that it outlives its supervisor.
class Job {
 public:
  explicit Job(boost::asio::io_context& context) : context_(context) {}

  // `ended` is called from the context. An Error where no process can be made.
  void start(const std::vector<std::string>& command, const std::string& log,
             std::function<void()> ended);
  // Takes over one that another supervisor has started. False: it is gone.
  bool adopt(pid_t pid, int64_t started, std::function<void()> ended);

  bool runs() const { return runs_; }
  pid_t pid() const { return pid_; }
  int64_t started() const { return started_; }
  // When it has ended: its exit code, or 128 + signal; nothing where it was no child of this
  // process.
  std::optional<int> code() const { return code_; }
  void signal(int signal) const;  // while it runs

 private:
  void watch(std::function<void()> ended);
  boost::asio::io_context& context_;
  pid_t pid_ = 0;
  int64_t started_ = 0;
  bool runs_ = false, child_ = false;
  std::optional<int> code_;
  std::unique_ptr<ProcessEnd> end_;
};

}  // namespace moemamba
