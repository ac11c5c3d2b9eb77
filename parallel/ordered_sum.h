#pragma once
#include "core/device.h"

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
  DeviceKind device = DeviceKind::cpu;  // where all of them lie
};

// Enqueued; of f32, f64 and i64 (float, double, int64_t). cuda: on a CUDA stream.
template <class Number>
void ordered_sum(Stream& stream, const OrderedSum<Number>& sum);

}  // namespace moemamba
