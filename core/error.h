#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

namespace moemamba {

// Everything that moemamba throws. Caught in launcher/main.cc alone, which prints what() and exits.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A member of a group died, hangs or was cut off. The program's exit code then means "restart me".
class PeerLost : public Error {
 public:
  PeerLost(std::string group, int rank, const std::string& why);
  const std::string& group() const { return group_; }
  int rank() const { return rank_; }  // within the world; -1 = not known

 private:
  std::string group_;
  int rank_;
};

// Converts from bool and remembers the caller's line, so that check() needs no macro.
struct Condition {
  Condition(bool holds, const char* file = __builtin_FILE(), int line = __builtin_LINE())
      : holds(holds), file(file), line(line) {}
  bool holds;
  const char* file;
  int line;
};

// Throws Error with `message`; the line that asked is appended in brackets.
[[noreturn]] void fail(const Condition& where, const std::string& message);

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// Throws Error with the concatenated parts unless `condition` holds. A message says what was
// expected, what was found and what to change.
template <class... Parts>
void check(const Condition& condition, const Parts&... parts) {
  if (!condition.holds) [[unlikely]]
    fail(condition, concat(parts...));
}

}  // namespace moemamba
