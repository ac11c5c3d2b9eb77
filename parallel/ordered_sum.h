#pragma once
#include <cstdint>

namespace moemamba {  // letters: N ranks, n elements

// own[i] = parts of rank 0 + rank 1 + ... + rank N - 1, added in this order: the same bits on every
// rank and for every way in which the parts came. The own part is read from `own` and replaced.
template <class Number>
struct OrderedSum {
  const Number* parts;  // rank r's part is parts + r * stride; the own one is not read there
  int64_t stride;
  int ranks;
  int rank;      // of `own`
  Number* own;   // [n] read and written
  int64_t count; // n
};

template <class Number>
void ordered_sum(const OrderedSum<Number>& sum);  // f32, f64 and i64 (float, double, int64_t)

}  // namespace moemamba
