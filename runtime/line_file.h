#pragma once
#include <memory>
#include <string>

#include "core/file.h"

namespace moemamba {

// A file that grows by whole lines, each a JSON object with the "step" that it belongs to (or by
// whole records of another kind, where nothing is ever cut). A disk that refuses a line costs that
// line and one sentence on stderr, never the training. Allocates nothing after construction while
// the disk accepts.
class LineFile {
 public:
  // Appends to `path`. Unlike a later write, failing to open is an Error. what: "metrics", for that
  // sentence.
  LineFile(FileSystem& files, std::string path, std::string what);
  void add(const char* line, size_t length);  // with its newline
  void cut(int64_t step);                     // cut_lines; goes on behind them
  int64_t lost_lines() const { return lost_lines_; }

 private:
  void open();
  void drop_torn_line();
  FileSystem& files_;
  std::string path_, what_;
  std::unique_ptr<OutputFile> file_;
  int64_t bytes_ = 0;  // whole lines so far
  bool torn_ = false;  // a part of a line may follow them
  int64_t lost_lines_ = 0;
};

// Drops the lines of steps from `step` on, for a run that goes on there, and a torn last line.
void cut_lines(FileSystem& files, const std::string& path, int64_t step);

}  // namespace moemamba
