#pragma once
#include <string>

#include "launcher/supervisor/run_view.h"
#include "runtime/run_records.h"

namespace moemamba {

// What the status server's answers have in common: pure functions of what is known of a run.

const char* name_of(RunState state);
const char* name_of(RankState state);

struct Health {
  bool good = true;
  std::string text;  // one sentence
};
// Bad: the run has failed, or a rank hangs and nothing is done about it yet.
Health health_of(const RunView& view);

struct RunProgress {
  int64_t steps_done = 0;
  double step_seconds = 0;  // of late; 0: not known
  double eta_seconds = -1;  // negative: not known
};
RunProgress progress_of(const RunView& view, const RunRecords::State& records);

// How evenly a layer's choices are spread over its experts.
struct LayerLoad {
  double most = 0, least = 0;  // as multiples of the even share
  double variation = 0;        // standard deviation / mean
  int dead = 0;                // experts that no token chose
};
LayerLoad load_of(const ExpertView& experts, int layer);

// JSON for the page and for programs (docs/status_server.md). Texts may hold any bytes.
std::string status_json(const RunView& view, const RunRecords::State& records, double now);
std::string curves_json(const RunRecords& records, int64_t from);
std::string samples_json(const RunRecords& records);

// What the status server counts of itself.
struct StatusCounts {
  int64_t answered = 0, refused = 0, cut_off = 0;
};
// Prometheus' text format 0.0.4.
std::string metrics_text(const RunView& view, const RunRecords::State& records,
                         const StatusCounts& counts, double now);

}  // namespace moemamba
