#include "runtime/compare.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "core/file.h"
#include "runtime/plot.h"

namespace moemamba {

namespace {

MetricColumns metrics_of(const ComparedRun& run) {
  const std::string path = join_path(run.folder, "metrics.jsonl");
  check(file_exists(path), run.folder, ": no run is there (expected ", path,
        "); give folders that `moemamba train` wrote");
  MetricColumns metrics = read_metrics(path);
  check(!metrics.held_out_loss.empty(), path,
        ": the run was never evaluated; train it with --data.validation");
  return metrics;
}

std::string millions(int64_t count) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2fM", double(count) * 1e-6);
  return text;
}

// The median, for the first steps are slower.
double median(std::vector<double> values) {
  if (values.empty()) return 0;
  std::nth_element(values.begin(), values.begin() + std::ptrdiff_t(values.size() / 2),
                   values.end());
  return values[values.size() / 2];
}

// Steps until the held-out loss was at most `loss`, between evaluations on a straight line; 0:
// never.
double steps_until(const MetricColumns& metrics, double loss) {
  const auto &x = metrics.held_out_step, &y = metrics.held_out_loss;
  for (size_t i = 0; i < y.size(); ++i) {
    if (!(y[i] <= loss)) continue;
    if (i == 0 || y[i - 1] == y[i]) return x[i] + 1;
    return x[i - 1] + 1 + (x[i] - x[i - 1]) * (y[i - 1] - loss) / (y[i - 1] - y[i]);
  }
  return 0;
}

}  // namespace

std::string comparison_table(const std::vector<ComparedRun>& runs) {
  check(!runs.empty(), "there is nothing to compare; give the folders of runs");
  const double goal = metrics_of(runs[0]).held_out_loss.back();
  std::string table = concat(
      "| run | parameters | active | held-out loss | bits per byte | tokens/s | steps to the loss "
      "of ",
      runs[0].name, " |\n|---|---|---|---|---|---|---|\n");
  for (const ComparedRun& run : runs) {
    const MetricColumns metrics = metrics_of(run);
    const double steps = steps_until(metrics, goal), bits = metrics.held_out_bpb.back();
    char numbers[160];
    std::snprintf(numbers, sizeof numbers, " | %.4f | %s | %.0f | %s |\n",
                  metrics.held_out_loss.back(),
                  std::isfinite(bits) ? std::to_string(bits).substr(0, 6).c_str() : "-",
                  median(metrics.tokens_per_second),
                  steps > 0 ? std::to_string(std::lround(steps)).c_str() : "not reached");
    table += concat("| ", run.name, " | ", millions(run.counts.total), " | ",
                    millions(run.counts.active), numbers);
  }
  return table;
}

std::string comparison_svg(const std::vector<ComparedRun>& runs) {
  Plot plot{.title = "Held-out loss",
            .x_label = "step",
            .y_label = "cross-entropy, nats per token",
            .series = {}};
  for (const ComparedRun& run : runs) {
    const MetricColumns metrics = metrics_of(run);
    Series series{.label = run.name, .x = {}, .y = metrics.held_out_loss};
    for (double step : metrics.held_out_step) series.x.push_back(step + 1);
    plot.series.push_back(std::move(series));
  }
  return to_svg(plot);
}

}  // namespace moemamba
