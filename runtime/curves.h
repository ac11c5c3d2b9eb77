#pragma once
#include <array>
#include <cmath>
#include <cstdint>
#include <deque>
#include <vector>

namespace moemamba {

// The columns of a run's curves, in this order.
enum class Column {
  loss,
  ce,
  grad_norm,
  lr,
  tokens_per_second,
  dropped_rows,
  val_loss,
  val_bpb,
};
constexpr size_t kColumns = 8;
using StepValues = std::array<float, kColumns>;  // NaN: not there, or not finite

// What a column was over some steps; a value that is not there leaves no trace.
struct CurveValue {
  float mean = NAN, least = NAN, most = NAN;
  int64_t count = 0;
  void add(const CurveValue& other);
};

struct CurveRow {
  int64_t first = 0, last = 0;  // steps
  std::array<CurveValue, kColumns> values;
  const CurveValue& operator[](Column column) const { return values[size_t(column)]; }
  void add(const CurveRow& later);
};

// A run's curves in little memory: the newest steps one by one, older ones by twos, fours, eights,
// with mean and extremes. What it takes grows with the logarithm of the steps.
class Curves {
 public:
  explicit Curves(size_t rows_of_level = 4096) : most_(rows_of_level) {}
  // Steps come in order. One that was there already begins anew: it and what came after it go.
  void add(int64_t step, const StepValues& values);
  // From the step `from` on, oldest first: as they are where these are at most `most` rows, else
  // put together to at most half as many of about the same number of steps each (two points for
  // each: the extremes).
  std::vector<CurveRow> rows(int64_t from, size_t most) const;
  bool empty() const;
  int64_t last_step() const;  // -1: none

 private:
  void drop_from(int64_t step);
  size_t most_;
  std::vector<std::deque<CurveRow>> levels_;  // newest steps first, each in order of steps
};

}  // namespace moemamba
