#pragma once
#include <functional>
#include <string>

#include "launcher/events_file.h"
#include "launcher/supervisor/outlet.h"
#include "launcher/supervisor/run_view.h"

namespace moemamba {

// What people want to know later: a line of <run>/events.jsonl each, and the newest in the view.
// A disk that refuses a line costs that line, never the run.
class EventLog {
 public:
  // hold: while it is true nothing is written to the file; afterwards all of it. The folder may be
  // about to be emptied for a new run.
  EventLog(std::string run, RunView& view, Outlet& terminal, std::function<bool()> hold);

  void recall();  // what the file has of earlier supervisors, into the view

  struct Event {
    std::string kind;
    int64_t step = -1;
    std::string text;
    double seconds = -1;  // how long it took; negative: not known
  };
  void note(const Event& event);  // of a rank, which has said it on the terminal
  void say(const Event& event);   // of the supervisor: on the terminal too
  void flush();                   // tries to write what was held

 private:
  EventsFile file_;
  RunView& view_;
  Outlet& terminal_;
  std::function<bool()> hold_;
};

}  // namespace moemamba
