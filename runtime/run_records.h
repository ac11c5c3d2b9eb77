#pragma once
#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "runtime/curves.h"
#include "runtime/line_tail.h"
#include "runtime/metrics.h"

namespace moemamba {

// Upper bounds of the buckets of a step's duration, in seconds; one more has no bound.
constexpr std::array<double, 14> kDurationBounds = {0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
                                                    1,     2.5,  5,     10,   30,  60,   300};

// Sums over the steps that came while somebody followed the run, those that were taken again
// included: they only grow.
struct RecordTotals {
  int64_t steps = 0;
  double dropped_rows = 0;
  StepSeconds seconds;  // of rank 0
  std::array<int64_t, kDurationBounds.size() + 1> durations{};
};

struct SampleText {
  int64_t step = 0;
  std::string prompt, text;
};

// What a run has written of itself, followed while it is written: metrics.jsonl and samples.jsonl.
// poll() belongs to one thread, the rest to any.
class RunRecords {
 public:
  explicit RunRecords(const std::string& run);

  // Reads on, some milliseconds at most. True: there is more to read at once.
  bool poll();

  struct State {
    int64_t epoch = 0;                 // another one: what was read of the curves does not hold
    bool behind = true;                // not all of the file was read yet
    std::optional<StepRecord> latest;  // step; what the file does not have is NaN or 0
    std::optional<StepRecord> latest_evaluation;
    double tokens_per_second = 0;  // over the latest steps; 0: not known
    RecordTotals totals;
  };
  State state() const;
  std::vector<CurveRow> rows(int64_t from, size_t most) const;  // Curves::rows
  std::vector<SampleText> samples() const;                      // oldest first, the newest ten

 private:
  struct Book {  // of one file
    Curves curves;
    std::optional<StepRecord> latest, latest_evaluation;
    std::deque<double> speeds;
  };
  bool poll_metrics();
  bool poll_samples();
  static void write(Book& book, const StepRecord& record);
  void count(const StepRecord& record);

  LineTail metrics_, sample_lines_;
  mutable std::mutex mutex_;  // of all below
  Book book_, next_;          // next_: of a file that took the first one's place, until it is read
  bool replaced_ = false, behind_ = true;
  int64_t epoch_ = 0;
  RecordTotals totals_;
  std::deque<SampleText> samples_;
};

}  // namespace moemamba
