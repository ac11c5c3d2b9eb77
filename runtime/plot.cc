#include "runtime/plot.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <nlohmann/json.hpp>

#include "core/error.h"

namespace moemamba {
namespace {

constexpr double kWidth = 760, kHeight = 420;
constexpr double kLeft = 64, kRight = 20, kTop = 44, kBottom = 52;
// Okabe and Ito's colours, which differ for colour-blind eyes too; mid-tones, for both grounds.
constexpr const char* kColors[] = {"#0072b2", "#d55e00", "#009e73",
                                   "#cc79a7", "#b8860b", "#56b4e9"};

struct Range {
  double low = std::numeric_limits<double>::infinity();
  double high = -std::numeric_limits<double>::infinity();
  void add(double value) {
    if (!std::isfinite(value)) return;
    low = std::min(low, value);
    high = std::max(high, value);
  }
  void widen() {
    if (low > high) low = 0, high = 1;
    if (low == high) low -= 0.5, high += 0.5;
  }
};

// 1, 2 or 5 times a power of ten, so that about `count` steps cover the range.
double round_step(const Range& range, int count) {
  const double raw = (range.high - range.low) / count;
  const double power = std::pow(10.0, std::floor(std::log10(raw)));
  for (const double factor : {1.0, 2.0, 5.0})
    if (raw <= factor * power) return factor * power;
  return 10 * power;
}

std::string number(double value, const char* format = "%.6g") {
  char buffer[32];
  std::snprintf(buffer, sizeof(buffer), format, value);
  return buffer;
}

std::string at(double value) {
  return number(value, "%.1f");
}

std::string escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '&')
      out += "&amp;";
    else if (c == '<')
      out += "&lt;";
    else if (c == '>')
      out += "&gt;";
    else if (c == '"')
      out += "&quot;";
    else if (uint8_t(c) >= 32)
      out += c;
  }
  return out;
}

// Data to picture coordinates.
struct Frame {
  Range x, y;
  double px(double value) const {
    return kLeft + (value - x.low) / (x.high - x.low) * (kWidth - kLeft - kRight);
  }
  double py(double value) const {
    return kHeight - kBottom - (value - y.low) / (y.high - y.low) * (kHeight - kTop - kBottom);
  }
};

Frame frame_of(const Plot& plot) {
  Frame frame;
  for (const Series& series : plot.series) {
    check(series.x.size() == series.y.size(), "series ", series.label, ": ", series.x.size(),
          " x but ", series.y.size(), " y");
    for (size_t i = 0; i < series.x.size(); ++i) {
      if (!std::isfinite(series.x[i]) || !std::isfinite(series.y[i])) continue;
      frame.x.add(series.x[i]);
      frame.y.add(series.y[i]);
    }
  }
  frame.x.widen();
  frame.y.widen();
  const double margin = 0.04 * (frame.y.high - frame.y.low);
  frame.y.low -= margin;
  frame.y.high += margin;
  return frame;
}

std::string text(double x, double y, const std::string& anchor, const std::string& words,
                 const std::string& more = "") {
  return "<text x=\"" + at(x) + "\" y=\"" + at(y) + "\" text-anchor=\"" + anchor + "\"" + more +
         ">" + escaped(words) + "</text>\n";
}

std::string line(double x1, double y1, double x2, double y2, const char* kind) {
  return "<line x1=\"" + at(x1) + "\" y1=\"" + at(y1) + "\" x2=\"" + at(x2) + "\" y2=\"" + at(y2) +
         "\" class=\"" + kind + "\"/>\n";
}

std::string axes(const Plot& plot, const Frame& frame) {
  const double right = kWidth - kRight, bottom = kHeight - kBottom;
  std::string svg;
  const double dy = round_step(frame.y, 6), dx = round_step(frame.x, 8);
  for (double n = std::ceil(frame.y.low / dy); n * dy <= frame.y.high; ++n) {
    svg += line(kLeft, frame.py(n * dy), right, frame.py(n * dy), "grid");
    svg += text(kLeft - 8, frame.py(n * dy) + 4, "end", number(n * dy));
  }
  for (double n = std::ceil(frame.x.low / dx); n * dx <= frame.x.high; ++n) {
    svg += line(frame.px(n * dx), bottom, frame.px(n * dx), bottom + 5, "axis");
    svg += text(frame.px(n * dx), bottom + 19, "middle", number(n * dx));
  }
  svg += line(kLeft, bottom, right, bottom, "axis") + line(kLeft, kTop, kLeft, bottom, "axis");
  svg += text((kLeft + right) / 2, kHeight - 12, "middle", plot.x_label);
  svg += text(0, 0, "middle", plot.y_label,
              " transform=\"translate(16 " + at((kTop + bottom) / 2) + ") rotate(-90)\"");
  svg += text(kLeft, 20, "start", plot.title, " class=\"title\"");
  return svg;
}

std::string marks(const Series& series, const Frame& frame, const std::string& color) {
  std::string svg = "<g fill=\"" + color + "\">\n";
  for (size_t i = 0; i < series.x.size(); ++i) {
    if (!std::isfinite(series.x[i]) || !std::isfinite(series.y[i])) continue;
    svg += "<circle cx=\"" + at(frame.px(series.x[i])) + "\" cy=\"" + at(frame.py(series.y[i])) +
           "\" r=\"3.5\"/>\n";
  }
  return svg + "</g>\n";
}

std::string curve(const Series& series, const Frame& frame, const std::string& color) {
  std::string path;
  bool pen_down = false;
  for (size_t i = 0; i < series.x.size(); ++i) {
    const bool finite = std::isfinite(series.x[i]) && std::isfinite(series.y[i]);
    if (finite)
      path += (pen_down ? "L" : "M") + at(frame.px(series.x[i])) + " " + at(frame.py(series.y[i]));
    pen_down = finite;
  }
  return "<path d=\"" + path + "\" fill=\"none\" stroke=\"" + color + "\" stroke-width=\"" +
         (series.faint ? "1\" opacity=\"0.35" : "2") + "\" stroke-linejoin=\"round\"/>\n";
}

std::string legend(const Plot& plot) {
  std::string svg;
  double y = kTop + 14;
  for (size_t s = 0; s < plot.series.size(); ++s) {
    const std::string color = kColors[s % std::size(kColors)];
    svg += text(kWidth - kRight - 30, y + 4, "end", plot.series[s].label);
    svg += "<rect x=\"" + at(kWidth - kRight - 24) + "\" y=\"" + at(y - 2) +
           "\" width=\"18\" height=\"4\" fill=\"" + color + "\"" +
           (plot.series[s].faint ? " opacity=\"0.35\"" : "") + "/>\n";
    y += 18;
  }
  return svg;
}

}  // namespace

std::string to_svg(const Plot& plot) {
  const Frame frame = frame_of(plot);
  std::string svg = "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 " + number(kWidth) +
                    " " + number(kHeight) + "\" font-family=\"sans-serif\" font-size=\"12\">\n";
  svg +=
      "<style>.ground{fill:#ffffff}text{fill:#24292f}.title{font-size:15px;font-weight:600}"
      ".grid{stroke:#808080;stroke-opacity:.25}.axis{stroke:#808080}"
      "@media(prefers-color-scheme:dark){.ground{fill:#0d1117}text{fill:#d0d7de}}</style>\n";
  svg += "<rect class=\"ground\" width=\"100%\" height=\"100%\"/>\n" + axes(plot, frame);
  for (const bool faint : {true, false}) {
    for (size_t s = 0; s < plot.series.size(); ++s) {
      const Series& series = plot.series[s];
      if (series.faint != faint) continue;
      const std::string color = kColors[s % std::size(kColors)];
      svg += series.points ? marks(series, frame, color) : curve(series, frame, color);
    }
  }
  return svg + legend(plot) + "</svg>\n";
}

std::vector<double> smoothed(const std::vector<double>& values, double half_life) {
  const double keep = std::pow(0.5, 1 / std::max(half_life, 1e-9));
  std::vector<double> means;
  double sum = 0, weight = 0;
  for (const double value : values) {
    if (std::isfinite(value)) {
      sum = keep * sum + (1 - keep) * value;
      weight = keep * weight + (1 - keep);
    }
    means.push_back(weight > 0 ? sum / weight : std::numeric_limits<double>::quiet_NaN());
  }
  return means;
}

MetricColumns read_metrics(const std::string& metrics_path) {
  const std::string content = read_file(metrics_path);
  MetricColumns columns;
  for (size_t begin = 0, end = 0; (end = content.find('\n', begin)) != std::string::npos;
       begin = end + 1) {
    const auto row = nlohmann::json::parse(content.substr(begin, end - begin), nullptr, false);
    if (!row.is_object() || !row.contains("step") || !row["step"].is_number()) continue;
    const auto value = [&](const char* name) {
      return row.contains(name) && row[name].is_number() ? row[name].get<double>()
                                                         : std::numeric_limits<double>::quiet_NaN();
    };
    columns.step.push_back(value("step"));
    columns.ce.push_back(value("ce"));
    columns.tokens_per_second.push_back(value("tokens_per_second"));
    if (!row.contains("val_loss")) continue;
    columns.held_out_step.push_back(value("step"));
    columns.held_out_loss.push_back(value("val_loss"));
    columns.held_out_bpb.push_back(value("val_bpb"));
  }
  return columns;
}

Plot loss_plot(const std::string& metrics_path) {
  MetricColumns metrics = read_metrics(metrics_path);
  Series held_out{
      .label = "held out", .x = metrics.held_out_step, .y = metrics.held_out_loss, .points = true};
  Series mean{.label = "training", .x = metrics.step, .y = {}};
  mean.y = smoothed(metrics.ce, std::max(1.0, double(metrics.ce.size()) / 50));
  Series raw{.label = "each step",
             .x = std::move(metrics.step),
             .y = std::move(metrics.ce),
             .faint = true};
  Plot plot{.title = "Loss", .x_label = "step", .y_label = "cross-entropy, nats per token"};
  plot.series = {std::move(mean), std::move(raw)};
  if (!held_out.x.empty()) plot.series.insert(plot.series.begin() + 1, std::move(held_out));
  return plot;
}

void write_loss_svg(FileSystem& files, const std::string& folder) {
  const Plot plot = loss_plot(join_path(folder, "metrics.jsonl"));
  write_file(files, join_path(folder, "loss.svg"), to_svg(plot));
}

}  // namespace moemamba
