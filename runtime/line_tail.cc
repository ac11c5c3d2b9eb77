#include "runtime/line_tail.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <utility>

namespace moemamba {

LineTail::LineTail(std::string path, size_t most_line)
    : path_(std::move(path)), most_line_(most_line) {}

LineTail::~LineTail() {
  close();
}

void LineTail::close() {
  if (descriptor_ >= 0) ::close(descriptor_);
  descriptor_ = -1;
  at_ = 0;
  skipping_ = false;
}

void LineTail::open() {
  // Of a pipe's name nothing is read, and nobody waits for who would write to it.
  descriptor_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor_ < 0) return;
  struct stat found {};
  if (fstat(descriptor_, &found) != 0 || !S_ISREG(found.st_mode)) return close();
  device_ = uint64_t(found.st_dev);
  inode_ = uint64_t(found.st_ino);
}

// What is open is not what has the name, or was cut. While it is open nobody else gets its number.
bool LineTail::is_another() {
  struct stat named {};
  if (stat(path_.c_str(), &named) != 0) return true;
  return uint64_t(named.st_dev) != device_ || uint64_t(named.st_ino) != inode_ ||
         int64_t(named.st_size) < at_;
}

bool LineTail::poll(size_t most, FunctionRef<void()> anew,
                    FunctionRef<void(std::string_view)> take) {
  if (descriptor_ >= 0 && is_another()) {
    close();
    anew();
  }
  if (descriptor_ < 0) open();
  if (descriptor_ < 0) return false;
  bytes_.resize(std::max(most, most_line_ + 1));
  const ssize_t got = pread(descriptor_, bytes_.data(), bytes_.size(), at_);
  if (got <= 0) return false;
  std::string_view left(bytes_.data(), size_t(got));
  for (size_t end = 0; (end = left.find('\n')) != std::string_view::npos;) {
    if (!std::exchange(skipping_, false) && end <= most_line_) take(left.substr(0, end));
    left.remove_prefix(end + 1);
    at_ += int64_t(end) + 1;
  }
  if (skipping_ || left.size() > most_line_) {  // the part of it that is there
    skipping_ = true;
    at_ += int64_t(left.size());
  }
  return size_t(got) == bytes_.size();
}

}  // namespace moemamba
