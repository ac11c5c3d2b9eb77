#include "launcher/supervisor/job.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <boost/asio/post.hpp>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "core/error.h"
#include "runtime/process_facts.h"

namespace moemamba {

namespace {

constexpr auto kPoll = std::chrono::milliseconds(50);

// In the child: becomes the command, with nothing of this process but its environment.
[[noreturn]] void become(char* const* words, const char* log) {
  setsid();
  signal(SIGPIPE, SIG_DFL);
  const int out = open(log, O_WRONLY | O_CREAT | O_APPEND, 0600);
  const int in = open("/dev/null", O_RDONLY);
  if (out < 0 || in < 0) _exit(126);
  dup2(in, STDIN_FILENO);
  dup2(out, STDOUT_FILENO);
  dup2(out, STDERR_FILENO);
  closefrom(3);
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  execvp(words[0], words);
  dprintf(STDERR_FILENO, "moemamba: %s: %s; is it installed and in PATH?\n", words[0],
          strerror(errno));
  _exit(127);
}

}  // namespace

ProcessEnd::ProcessEnd(boost::asio::io_context& context, pid_t pid, int64_t started,
                       std::function<void()> ended)
    : pid_(pid),
      started_(started),
      ended_(std::move(ended)),
      descriptor_(context),
      timer_(context) {
  const auto held = int(syscall(SYS_pidfd_open, pid, 0));
  if (held >= 0 && process_start(pid) == started) {
    descriptor_.assign(held);
    descriptor_.async_wait(boost::asio::posix::stream_descriptor::wait_read,
                           [this, alive = alive_](const boost::system::error_code& error) {
                             if (*alive && !error) end();
                           });
    return;
  }
  const bool too_old = held < 0 && errno == ENOSYS;  // the kernel, before 5.3
  if (held >= 0) ::close(held);
  if (too_old)
    poll();
  else
    boost::asio::post(context, [this, alive = alive_] {
      if (*alive) end();
    });
}

ProcessEnd::~ProcessEnd() {
  *alive_ = false;
}

void ProcessEnd::poll() {
  if (process_start(pid_) != started_) return end();
  timer_.expires_after(kPoll);
  timer_.async_wait([this, alive = alive_](const boost::system::error_code& error) {
    if (*alive && !error) poll();
  });
}

void ProcessEnd::end() {
  const auto ended = std::move(ended_);  // may destroy this object
  ended_ = nullptr;
  if (ended) ended();
}

void Job::start(const std::vector<std::string>& command, const std::string& log,
                std::function<void()> ended) {
  std::vector<char*> words;
  for (const std::string& word : command) words.push_back(const_cast<char*>(word.c_str()));
  words.push_back(nullptr);
  sigset_t all, before;
  sigfillset(&all);  // a handler of this process must not run in the child
  sigprocmask(SIG_SETMASK, &all, &before);
  const pid_t child = fork();
  if (child == 0) become(words.data(), log.c_str());
  sigprocmask(SIG_SETMASK, &before, nullptr);
  check(child > 0, "cannot start ", command[0], ": ", std::strerror(errno));
  pid_ = child;
  started_ = process_start(child);
  child_ = true;
  watch(std::move(ended));
}

bool Job::adopt(pid_t pid, int64_t started, std::function<void()> ended) {
  if (pid <= 0 || started == 0 || process_start(pid) != started) return false;
  pid_ = pid;
  started_ = started;
  child_ = false;
  watch(std::move(ended));
  return true;
}

void Job::watch(std::function<void()> ended) {
  runs_ = true;
  code_.reset();
  end_ = std::make_unique<ProcessEnd>(context_, pid_, started_, [this, ended = std::move(ended)] {
    runs_ = false;
    int status = 0;
    if (child_ && waitpid(pid_, &status, 0) == pid_)
      code_ = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    ended();
  });
}

void Job::signal(int signal) const {
  if (runs_ && process_start(pid_) == started_) kill(pid_, signal);
}

}  // namespace moemamba
