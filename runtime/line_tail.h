#pragma once
#include <cstdint>
#include <string>
#include <string_view>

#include "core/device.h"

namespace moemamba {

// Follows a file that grows by whole lines, and that others may cut, replace or remove meanwhile.
// Of a line that is longer than `most_line` bytes nothing is kept. One thread at a time.
class LineTail {
 public:
  LineTail(std::string path, size_t most_line);
  ~LineTail();
  LineTail(const LineTail&) = delete;
  LineTail& operator=(const LineTail&) = delete;

  // Reads up to `most` bytes and hands out the whole lines among them, without their newlines.
  // anew: called before the first line of what is another file now, or none. Returns whether there
  // may be more to read at once. A file that cannot be read counts as none.
  bool poll(size_t most, FunctionRef<void()> anew, FunctionRef<void(std::string_view)> take);

 private:
  bool is_another();
  void open();
  void close();
  std::string path_;
  size_t most_line_;
  int descriptor_ = -1;
  uint64_t device_ = 0, inode_ = 0;
  int64_t at_ = 0;         // behind the last whole line
  bool skipping_ = false;  // amid a line that is too long
  std::string bytes_;
};

}  // namespace moemamba
