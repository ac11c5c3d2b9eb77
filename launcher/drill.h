#pragma once
#include <string>
#include <vector>

#include "runtime/commands.h"

namespace CLI {
class App;
}

namespace moemamba {

// A fault that a training makes on purpose, so that people can see what becomes of it
// (docs/running.md). Steps are counted from 0, as in metrics.jsonl.
struct Drill {
  enum class Kind { crash, hang, slow, stop, nan };
  Kind kind = Kind::crash;
  int rank = 0;
  int64_t step = 0;   // slow: the first one
  double factor = 1;  // slow: how many times as long as it takes to compute
  int64_t times = 1;  // of a run, over all its launches; kAlways: each time
  std::string text;   // all of the above in one form
  static constexpr int64_t kAlways = -1;
};

// "KIND key=value...". BadSettings that says what is wrong and what is accepted.
Drill parse_drill(const std::string& text);

// --drill, which may be given again and again.
void add_drill_option(CLI::App& app, std::vector<std::string>& drills);

// Makes the drills of this rank happen in the training of `request`. Those that happen a number of
// times are written down in <run>/drills.txt before they do.
void wire_drills(const std::vector<Drill>& drills, int rank, TrainRequest& request);

}  // namespace moemamba
