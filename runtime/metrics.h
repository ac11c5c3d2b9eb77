#pragma once
#include <array>
#include <optional>
#include <string>

#include "runtime/line_file.h"

namespace moemamba {

// Seconds that one step spent in each phase.
struct StepSeconds {
  double data = 0;
  double forward = 0;
  double backward = 0;
  double exchange = 0;   // waiting for expert rows
  double reduction = 0;  // waiting for gradients
  double optimizer = 0;
  double all = 0;      // from its begin to its end
  double waiting = 0;  // of these, for other ranks; 0 where nobody watches this rank
};

// What one step tells of itself. Losses are nats per token.
struct StepRecord {
  int64_t step = 0;
  double loss = 0;  // ce + balance_loss + z_loss: what is optimised
  double ce = 0;
  double balance_loss = 0;
  double z_loss = 0;
  double grad_norm = 0;
  double lr = 0;
  double tokens_per_second = 0;
  double load_max_over_mean = 0;  // of the worst layer
  int64_t dead_experts = 0;       // over all layers
  int64_t dropped_rows = 0;
  StepSeconds seconds;
  int64_t rows = 0;                // that this rank's experts worked on
  std::optional<double> val_loss;  // where the step ended with an evaluation
  std::optional<double> val_bpb;
  std::array<char, 65> chain{};        // 64 hex digits; empty: none
  std::optional<uint64_t> state_hash;  // where the state was hashed after the step
  int64_t failed_saves = 0;            // checkpoints of this launch that failed so far
  int64_t replays = 0;                 // attempts of this launch that were not finite, before it
  bool skipped = false;                // nor was this one: nothing was changed by the step
  int64_t skipped_steps = 0;           // of this launch so far
};

// metrics.jsonl: one JSON object a step; what is not finite becomes null.
class MetricsWriter {
 public:
  MetricsWriter(FileSystem& files, const std::string& path);
  void record(const StepRecord& record);
  void cut(int64_t step) { lines_.cut(step); }
  int64_t lost_lines() const { return lines_.lost_lines(); }

 private:
  LineFile lines_;
};

// The line of `record` without its newline, into buffer; returns its length.
// REQUIRES: size >= kMetricsLine.
constexpr size_t kMetricsLine = 1024;
size_t format_metrics(const StepRecord& record, char* buffer, size_t size);

}  // namespace moemamba
