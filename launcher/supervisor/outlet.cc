#include "launcher/supervisor/outlet.h"

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>

namespace moemamba {

namespace {

constexpr size_t kMostKept = 1 << 20;
constexpr size_t kAtOnce = 4096;  // PIPE_BUF: where poll says that a pipe can be written, this fits

bool takes(int descriptor, int milliseconds) {
  pollfd wanted{.fd = descriptor, .events = POLLOUT, .revents = 0};
  return poll(&wanted, 1, milliseconds) == 1 && (wanted.revents & POLLOUT) != 0;
}

}  // namespace

void Outlet::write(std::string_view text) {
  if (text.empty()) return;
  line_open_ = text.back() != '\n';
  kept_.append(text);
  if (kept_.size() > kMostKept) {
    const size_t line = kept_.find('\n', kept_.size() - kMostKept / 2);
    kept_.erase(0, line == std::string::npos ? kept_.size() - kMostKept / 2 : line + 1);
  }
  pump();
}

void Outlet::say(const std::string& line) {
  write((line_open_ ? "\n" : "") + line + "\n");
}

void Outlet::pump() {
  while (!kept_.empty() && takes(descriptor_, 0)) {
    const ssize_t written = ::write(descriptor_, kept_.data(), std::min(kept_.size(), kAtOnce));
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) {
      if (errno != EAGAIN) kept_.clear();  // nobody reads it any more
      return;
    }
    kept_.erase(0, size_t(written));
  }
}

void Outlet::finish(double most_seconds) {
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::duration<double>(most_seconds);
  while (!kept_.empty() && Clock::now() < end)
    if (takes(descriptor_, 20)) pump();
}

LogFollower::~LogFollower() {
  if (descriptor_ >= 0) close(descriptor_);
}

void LogFollower::open(const std::string& path, bool from_end) {
  if (descriptor_ >= 0) close(descriptor_);
  path_ = path;
  descriptor_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor_ >= 0 && from_end) lseek(descriptor_, 0, SEEK_END);
}

void LogFollower::follow(Outlet& to) {
  if (descriptor_ < 0 && !path_.empty()) descriptor_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor_ < 0) return;
  char bytes[16384];
  for (ssize_t got; (got = read(descriptor_, bytes, sizeof bytes)) > 0;)
    to.write({bytes, size_t(got)});
}

}  // namespace moemamba
