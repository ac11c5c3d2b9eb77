#pragma once
#include <string>
#include <vector>

#include "core/file.h"

namespace moemamba {

// One curve. Points that are not finite leave a gap.
struct Series {
  std::string label;
  std::vector<double> x;
  std::vector<double> y;
  bool points = false;  // marks instead of a line
  bool faint = false;   // drawn pale, below the others
};

struct Plot {
  std::string title;
  std::string x_label;
  std::string y_label;
  std::vector<Series> series;
};

// A picture that reads well on light and on dark ground: axes, round ticks, a legend.
std::string to_svg(const Plot& plot);

// Exponential mean with a half-life of `half_life` points, corrected at its start.
std::vector<double> smoothed(const std::vector<double>& values, double half_life);

// What a metrics.jsonl holds, column by column; a value that is missing is NaN. A last line that is
// cut off is ignored.
struct MetricColumns {
  std::vector<double> step, ce, tokens_per_second;
  std::vector<double> held_out_step, held_out_loss, held_out_bpb;  // where there was an evaluation
};
MetricColumns read_metrics(const std::string& metrics_path);

// Cross-entropy per step (pale), smoothed, and the held-out points, from a metrics.jsonl.
Plot loss_plot(const std::string& metrics_path);

// Draws `folder`/metrics.jsonl as `folder`/loss.svg.
void write_loss_svg(FileSystem& files, const std::string& folder);

}  // namespace moemamba
