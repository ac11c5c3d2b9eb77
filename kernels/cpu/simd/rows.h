#pragma once
#include <cstdint>

#include "kernels/cpu/simd/level.h"

namespace moemamba {

// Loops over one row of n floats, one set per instruction set. The sums that they return are the
// same bits on both; a NaN stays a NaN.
struct RowKernels {
  void (*add)(float* y, const float* x, int64_t n);             // y += x
  void (*scale)(float* y, float w, const float* x, int64_t n);  // y = w x
  void (*axpy)(float* y, float w, const float* x, int64_t n);   // y += w x
  // Returns <x, y> and writes z = w x; z may be y.
  float (*dot_and_scale)(const float* x, const float* y, float* z, float w, int64_t n);
  // The greatest x and sum_i exp(x[i] - greatest). REQUIRES: n >= 1
  void (*exp_sum)(const float* x, int64_t n, float* greatest, float* sum);
  // p = w exp(x - shift); p may be x.
  void (*scaled_exp)(float* p, const float* x, float shift, float w, int64_t n);
};
namespace avx2 {
extern const RowKernels row_kernels;
}
namespace avx512 {
extern const RowKernels row_kernels;
}
const RowKernels& row_kernels(SimdLevel level);

}  // namespace moemamba
