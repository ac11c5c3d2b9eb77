#pragma once
#include <string>
#include <vector>

#include "model/counts.h"

namespace moemamba {

// One run beside others.
struct ComparedRun {
  std::string name;    // of its folder
  std::string folder;  // with metrics.jsonl
  ModelCounts counts;
};

// A Markdown table, a row for each run in the order given: parameters, held-out loss and bits per
// byte after the last step, and the step at which the run first was as good as the first run's end.
std::string comparison_table(const std::vector<ComparedRun>& runs);

// Held-out loss over steps, a curve for each run, as SVG.
std::string comparison_svg(const std::vector<ComparedRun>& runs);

}  // namespace moemamba
