#pragma once
#include <chrono>
#include <cstdio>
#include <string>
#include <string_view>

#include "runtime/metrics.h"

namespace moemamba {

struct ProgressOptions {
  int64_t steps = 0;           // of the run
  int64_t experts = 0;         // over all layers; 0 = nothing is said of experts
  int64_t routed_rows = 0;     // rows x choices over all layers in one step: the base of "drop"
  double bytes_per_token = 0;  // 0 = not known: no bits per byte
  bool terminal = false;       // one line drawn anew with \r, otherwise plain lines
  bool color = false;
  int64_t steps_between_lines = 0;  // plain lines; 0: one about every five seconds
  int columns = 0;                  // a terminal's width; 0 = not known
  bool brief = false;  // without lr, gradient norm, balance loss and dropped rows: narrow terminals
};

// One line of the present state on a terminal, plain lines elsewhere (the first step and the last
// always get one). Steps are counted from 1 for people:
// step 120/2000  loss 3.4121 (bpb 1.32)  lr 2.9e-3  gnorm 0.81  aux 1.02  load max 1.31x dead 0/32
//   drop 0.4%  12.3k tok/s  eta 04:12
class Progress {
 public:
  Progress(FILE* out, ProgressOptions options);
  ~Progress();
  void update(const StepRecord& record, bool last = false);
  // A line of its own that stays (an evaluation, a warning), without disturbing the running one.
  void say(std::string_view line);
  void finish();

 private:
  using Clock = std::chrono::steady_clock;
  FILE* out_;
  ProgressOptions options_;
  Clock::time_point started_;
  Clock::time_point last_line_;
  Clock::time_point last_step_;
  double step_seconds_ = 0;  // smoothed
  int64_t updates_ = 0;
  bool line_open_ = false;
};

// The line without colour or newline; eta_seconds < 0 = not known. Returns its length.
// REQUIRES: size >= kProgressLine.
constexpr size_t kProgressLine = 512;
size_t format_progress(const ProgressOptions& options, const StepRecord& record, double eta_seconds,
                       char* buffer, size_t size);

// 4:12 -> "04:12", over an hour "1:04:12", over a day "2d 03:04".
std::string format_duration(double seconds);

}  // namespace moemamba
