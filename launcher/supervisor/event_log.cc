#include "launcher/supervisor/event_log.h"

#include <fcntl.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>

#include "core/error.h"
#include "core/file.h"
#include "runtime/json_text.h"

namespace moemamba {

namespace {

constexpr size_t kMostInView = 200;
constexpr size_t kMostHeld = 1 << 20;

double wall_seconds() {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  return double(std::chrono::duration_cast<std::chrono::milliseconds>(now).count()) / 1e3;
}

// The last line is one that another supervisor did not finish.
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

EventLog::EventLog(std::string run, RunView& view, Outlet& terminal, std::function<bool()> hold)
    : path_(join_path(run, "events.jsonl")),
      view_(view),
      terminal_(terminal),
      hold_(std::move(hold)) {}

void EventLog::note(const Event& event) {
  const double now = wall_seconds();
  view_.events.push_back(
      {.wall_seconds = now, .kind = event.kind, .step = event.step, .text = event.text});
  if (view_.events.size() > kMostInView) view_.events.pop_front();
  if (held_.size() < kMostHeld)
    held_ +=
        concat(R"({"time":)", json_number(now), R"(,"kind":)", json_text(event.kind),
               event.step >= 0 ? concat(R"(,"step":)", event.step) : "",
               event.seconds >= 0 ? R"(,"seconds":)" + json_number(event.seconds) : "",
               R"(,"job":)", json_text(view_.job), R"(,"text":)", json_text(event.text), "}\n");
  flush();
}

void EventLog::say(const Event& event) {
  terminal_.say("moemamba: " + event.text);
  note(event);
}

// One write for all of it, so that lines stay whole beside whoever else appends.
void EventLog::flush() {
  if (held_.empty() || hold_()) return;
  const int file = open(path_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  if (file < 0) return;
  if (!checked_ && torn(path_)) held_.insert(0, "\n");
  checked_ = true;
  const ssize_t written = write(file, held_.data(), held_.size());
  close(file);
  if (written > 0) held_.erase(0, size_t(written));
}

}  // namespace moemamba
