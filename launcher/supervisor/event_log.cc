#include "launcher/supervisor/event_log.h"

#include <algorithm>
#include <sstream>
#include <utility>

#include "core/error.h"
#include "core/file.h"
#include "runtime/json_reader.h"

namespace moemamba {

namespace {

constexpr size_t kMostInView = 200;
constexpr int64_t kMostRecalled = 256 << 10;  // bytes

// "" where it cannot be read: a run that goes on is worth more than what was.
std::string end_of_file(const std::string& path, int64_t most) {
  try {
    const InputFile file(path);
    std::string text(size_t(std::min(most, file.bytes())), '\0');
    file.read_at(file.bytes() - int64_t(text.size()), text.data(), text.size());
    return text;
  } catch (const Error&) {
    return "";
  }
}

}  // namespace

EventLog::EventLog(std::string run, RunView& view, Outlet& terminal, std::function<bool()> hold)
    : file_(run), view_(view), terminal_(terminal), hold_(std::move(hold)) {}

// Lines that are none of an event are passed over, as the first one, which may be cut.
void EventLog::recall() {
  std::istringstream lines(end_of_file(file_.path(), kMostRecalled));
  for (std::string line; std::getline(lines, line);) {
    EventView event;
    try {
      JsonReader json(line, "an event");
      json.object([&](std::string_view key) {
        if (key == "time")
          event.wall_seconds = json.number();
        else if (key == "kind")
          event.kind = unescaped(json.string());
        else if (key == "step")
          event.step = json.integer();
        else if (key == "text")
          event.text = unescaped(json.string());
        else
          json.skip();
      });
      json.end();
    } catch (const Error&) {
      continue;
    }
    view_.events.push_back(std::move(event));
    if (view_.events.size() > kMostInView) view_.events.pop_front();
  }
}

void EventLog::note(const Event& event) {
  const double now = wall_seconds();
  view_.events.push_back(
      {.wall_seconds = now, .kind = event.kind, .step = event.step, .text = event.text});
  if (view_.events.size() > kMostInView) view_.events.pop_front();
  file_.add({.wall_seconds = now,
             .kind = event.kind,
             .step = event.step,
             .text = event.text,
             .seconds = event.seconds,
             .job = view_.job});
  flush();
}

void EventLog::say(const Event& event) {
  terminal_.say("moemamba: " + event.text);
  note(event);
}

void EventLog::flush() {
  if (!hold_()) file_.write();
}

}  // namespace moemamba
