#pragma once
#include <cstdint>
#include <string>

namespace moemamba {

// <run>/events.jsonl (docs/files.md): what people want to know later, a line each. A disk that
// refuses a line costs that line, never the run.
class EventsFile {
 public:
  explicit EventsFile(const std::string& run);
  const std::string& path() const { return path_; }

  struct Event {
    double wall_seconds = 0;  // since 1970
    std::string kind;
    int64_t step = -1;
    std::string text;
    double seconds = -1;  // how long it took; negative: not known
    std::string job;      // the attempt; empty: none
  };
  void add(const Event& event);  // kept until it is written
  void write();                  // tries to write what is kept

 private:
  std::string path_, kept_;
  bool checked_ = false;  // how the file ends
};

double wall_seconds();  // since 1970, to the millisecond

}  // namespace moemamba
