#include "launcher/events_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <chrono>

#include "core/error.h"
#include "core/file.h"
#include "runtime/json_text.h"

namespace moemamba {

namespace {

constexpr size_t kMostKept = 1 << 20;

// The last line is one that another process did not finish.
bool torn(const std::string& path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return false;
  char last = '\n';
  const off_t end = lseek(file, 0, SEEK_END);
  const bool known = end > 0 && pread(file, &last, 1, end - 1) == 1;
  close(file);
  return known && last != '\n';
}

}  // namespace

double wall_seconds() {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  return double(std::chrono::duration_cast<std::chrono::milliseconds>(now).count()) / 1e3;
}

EventsFile::EventsFile(const std::string& run) : path_(join_path(run, "events.jsonl")) {}

void EventsFile::add(const Event& event) {
  if (kept_.size() >= kMostKept) return;
  kept_ += concat(R"({"time":)", json_number(event.wall_seconds), R"(,"kind":)",
                  json_text(event.kind), event.step >= 0 ? concat(R"(,"step":)", event.step) : "",
                  event.seconds >= 0 ? R"(,"seconds":)" + json_number(event.seconds) : "",
                  event.job.empty() ? "" : R"(,"job":)" + json_text(event.job), R"(,"text":)",
                  json_text(event.text), "}\n");
}

// One write for all of it, so that lines stay whole beside whoever else appends.
void EventsFile::write() {
  if (kept_.empty()) return;
  const int file = open(path_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  if (file < 0) return;
  if (!checked_ && torn(path_)) kept_.insert(0, "\n");
  checked_ = true;
  const ssize_t written = ::write(file, kept_.data(), kept_.size());
  close(file);
  if (written > 0) kept_.erase(0, size_t(written));
}

}  // namespace moemamba
