#include "runtime/progress.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"

namespace moemamba {
namespace {

constexpr double kSmoothing = 0.1;  // weight of the newest step in the mean that the ETA uses
constexpr double kRedraw = 0.1;     // seconds between drawings of a terminal line
constexpr double kPlainLine = 5;    // seconds between plain lines
constexpr const char* kBold = "\033[1m";
constexpr const char* kPlain = "\033[0m";
constexpr const char* kEraseToEnd = "\033[K";

size_t format_duration_to(double seconds, char* buffer, size_t size) {
  const auto total = static_cast<long long>(std::llround(std::clamp(seconds, 0.0, 1e9)));
  const long long days = total / 86400, hours = total / 3600 % 24, minutes = total / 60 % 60;
  int length = 0;
  if (days > 0) {
    length = std::snprintf(buffer, size, "%lldd %02lld:%02lld", days, hours, minutes);
  } else if (hours > 0) {
    length = std::snprintf(buffer, size, "%lld:%02lld:%02lld", hours, minutes, total % 60);
  } else {
    length = std::snprintf(buffer, size, "%02lld:%02lld", minutes, total % 60);
  }
  return size_t(std::max(length, 0));
}

// 2.9e-3, not 2.9e-03.
void format_rate(double value, char* buffer, size_t size) {
  std::snprintf(buffer, size, "%.1e", value);
  const std::string text = buffer;
  const size_t e = text.find('e');
  if (e == std::string::npos || text.size() != e + 4 || text[e + 2] != '0') return;
  std::snprintf(buffer, size, "%s%c", text.substr(0, e + 2).c_str(), text[e + 3]);
}

}  // namespace

std::string format_duration(double seconds) {
  char buffer[64];
  return std::string(buffer, format_duration_to(seconds, buffer, sizeof(buffer)));
}

size_t format_progress(const ProgressOptions& options, const StepRecord& record, double eta_seconds,
                       char* buffer, size_t size) {
  check(size >= kProgressLine, "expected a buffer of ", kProgressLine, " bytes");
  size_t used = 0;
  const auto put = [&](const char* format, auto... values) {
    const int length = std::snprintf(buffer + used, size - used, format, values...);
    used = std::min(size - 1, used + size_t(std::max(length, 0)));
  };
  const auto integer = [](int64_t value) { return static_cast<long long>(value); };
  put("step %lld/%lld  loss %.4f", integer(record.step + 1), integer(options.steps), record.loss);
  if (options.bytes_per_token > 0)
    put(" (bpb %.2f)", record.ce / options.bytes_per_token / std::log(2.0));
  char rate[32];
  format_rate(record.lr, rate, sizeof(rate));
  if (!options.brief) put("  lr %s  gnorm %.2f", rate, record.grad_norm);
  if (options.experts > 0) {
    if (!options.brief) put("  aux %.4f", record.balance_loss);
    put("  load max %.2fx dead %lld/%lld", record.load_max_over_mean, integer(record.dead_experts),
        integer(options.experts));
    if (options.routed_rows > 0 && !options.brief)
      put("  drop %.1f%%", 100.0 * double(record.dropped_rows) / double(options.routed_rows));
  }
  const double speed = record.tokens_per_second;
  if (speed >= 1e6) {
    put("  %.2fM tok/s", speed / 1e6);
  } else if (speed >= 1e3) {
    put("  %.1fk tok/s", speed / 1e3);
  } else {
    put("  %.0f tok/s", speed);
  }
  char eta[64] = "--:--";
  if (eta_seconds >= 0) format_duration_to(eta_seconds, eta, sizeof(eta));
  put("  eta %s", eta);
  if (record.failed_saves > 0) put("  NOT SAVED %lldx", integer(record.failed_saves));
  if (record.skipped_steps > 0) put("  SKIPPED %lldx", integer(record.skipped_steps));
  return used;
}

Progress::Progress(FILE* out, ProgressOptions options)
    : out_(out), options_(options), started_(Clock::now()), last_step_(started_) {}

Progress::~Progress() {
  finish();
}

void Progress::update(const StepRecord& record, bool last) {
  const auto now = Clock::now();
  const auto seconds = [](Clock::duration d) { return std::chrono::duration<double>(d).count(); };
  const double took = seconds(now - last_step_);
  last_step_ = now;
  ++updates_;
  // The first step also pays for first use of memory; it counts only until there is a second.
  step_seconds_ = updates_ <= 2 ? took : step_seconds_ + kSmoothing * (took - step_seconds_);
  const int64_t done = record.step + 1;
  last |= done >= options_.steps;
  const int64_t interval = options_.terminal ? 0 : options_.steps_between_lines;
  const bool due = interval > 0
                       ? done % interval == 0
                       : seconds(now - last_line_) >= (options_.terminal ? kRedraw : kPlainLine);
  if (updates_ > 1 && !last && !due) return;
  last_line_ = now;
  char line[kProgressLine];
  const double eta = double(std::max<int64_t>(options_.steps - done, 0)) * step_seconds_;
  size_t length = format_progress(options_, record, eta, line, sizeof(line));
  if (options_.terminal && options_.columns > 1 && length >= size_t(options_.columns)) {
    ProgressOptions brief = options_;
    brief.brief = true;
    length = format_progress(brief, record, eta, line, sizeof(line));
  }
  if (!options_.terminal) {
    std::fprintf(out_, "%s\n", line);
  } else {
    if (options_.columns > 1) length = std::min(length, size_t(options_.columns - 1));
    std::fprintf(out_, "\r%s%.*s%s%s", options_.color ? kBold : "", int(length), line,
                 options_.color ? kPlain : "", kEraseToEnd);
    line_open_ = !last;
    if (last) std::fputc('\n', out_);  // it stays
  }
  std::fflush(out_);
}

void Progress::say(std::string_view line) {
  if (line_open_) std::fprintf(out_, "\r%s", kEraseToEnd);
  line_open_ = false;
  std::fprintf(out_, "%.*s\n", int(line.size()), line.data());
  std::fflush(out_);
}

void Progress::finish() {
  if (line_open_) std::fputc('\n', out_);
  line_open_ = false;
  std::fflush(out_);
}

}  // namespace moemamba
