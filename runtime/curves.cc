#include "runtime/curves.h"

#include <algorithm>

namespace moemamba {

void CurveValue::add(const CurveValue& other) {
  if (other.count == 0) return;
  if (count == 0) {
    *this = other;
    return;
  }
  count += other.count;
  mean += float((double(other.mean) - mean) * double(other.count) / double(count));
  least = std::min(least, other.least);
  most = std::max(most, other.most);
}

void CurveRow::add(const CurveRow& later) {
  last = later.last;
  for (size_t i = 0; i < kColumns; ++i) values[i].add(later.values[i]);
}

bool Curves::empty() const {
  return last_step() < 0;
}

int64_t Curves::last_step() const {
  for (const auto& level : levels_)
    if (!level.empty()) return level.back().last;
  return -1;
}

void Curves::drop_from(int64_t step) {
  for (auto& level : levels_) {
    while (!level.empty() && level.back().last >= step) level.pop_back();
    if (!level.empty()) return;
  }
}

void Curves::add(int64_t step, const StepValues& values) {
  drop_from(step);
  CurveRow row{.first = step, .last = step, .values = {}};
  for (size_t i = 0; i < kColumns; ++i)
    if (std::isfinite(values[i]))
      row.values[i] = {.mean = values[i], .least = values[i], .most = values[i], .count = 1};
  for (size_t level = 0;; ++level) {
    if (level == levels_.size()) levels_.emplace_back();
    levels_[level].push_back(row);
    if (levels_[level].size() <= most_) return;
    row = levels_[level].front();  // the two oldest go on as one
    levels_[level].pop_front();
    row.add(levels_[level].front());
    levels_[level].pop_front();
  }
}

std::vector<CurveRow> Curves::rows(int64_t from, size_t most) const {
  size_t count = 0;
  int64_t begin = -1;
  const auto for_each = [&](auto&& work) {
    for (auto level = levels_.rbegin(); level != levels_.rend(); ++level)
      for (const CurveRow& row : *level)
        if (row.last >= from) work(row);
  };
  for_each([&](const CurveRow& row) {
    if (count++ == 0) begin = row.first;
  });
  const int64_t groups = std::max<int64_t>(1, int64_t(std::min(most, count)) / 2);
  const int64_t span = count <= most ? 1 : (last_step() - begin) / groups + 1;
  std::vector<CurveRow> rows;
  int64_t group = -1;
  for_each([&](const CurveRow& row) {
    const int64_t own = (row.first - begin) / span;
    if (own == group)
      rows.back().add(row);
    else
      rows.push_back(row);
    group = own;
  });
  return rows;
}

}  // namespace moemamba
