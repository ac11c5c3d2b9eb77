#pragma once
#include <string>
#include <string_view>

namespace moemamba {

// Standard error of a process that must never wait for whoever reads it: what is not taken at once
// is kept, and of too much the oldest is left out.
class Outlet {
 public:
  explicit Outlet(int descriptor) : descriptor_(descriptor) {}
  void write(std::string_view text);  // as it is
  void say(const std::string& line);  // on a line of its own
  void pump();                        // writes what the reader takes now
  void finish(double most_seconds);   // at the end: waits for the reader, but not for longer

 private:
  int descriptor_;
  std::string kept_;
  bool line_open_ = false;  // what came last did not end with a newline
};

// Copies what is appended to a file to an outlet.
class LogFollower {
 public:
  ~LogFollower();
  // From its beginning, or from its end; the file may come to be later.
  void open(const std::string& path, bool from_end);
  void follow(Outlet& to);

 private:
  std::string path_;
  int descriptor_ = -1;
};

}  // namespace moemamba
