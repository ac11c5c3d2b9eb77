#include "launcher/supervisor/event_log.h"

#include <utility>

namespace moemamba {

namespace {

constexpr size_t kMostInView = 200;

}  // namespace

EventLog::EventLog(std::string run, RunView& view, Outlet& terminal, std::function<bool()> hold)
    : file_(run),
      view_(view),
      terminal_(terminal),
      hold_(std::move(hold)) {}

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
