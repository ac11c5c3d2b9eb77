#pragma once
#include "kernels/cuda/common.cuh"

namespace moemamba {  // sums over the rows of a matrix and over flat buffers, in a fixed order

// Where sums of columns go: those below `split` to first, the others to second.
struct ColumnSums {
  float* first;
  float* second;
  int64_t split;
};
// to[c] = sum over b of parts[b][c] (+ to[c]), parts: [blocks][columns] f32. The order depends on
// `blocks` alone.
void sum_parts(Stream& stream, const float* parts, int64_t blocks, int64_t columns, ColumnSums to,
               bool accumulate);

enum class Term : uint8_t { value, square };
// sum = sum of terms of x[P] in f64 (+ sum); takes the stream's workspace.
void sum_terms(Stream& stream, const Tensor& x, const Tensor& sum, Term term, bool accumulate);

}  // namespace moemamba
