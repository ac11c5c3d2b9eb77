#pragma once
#include <cstdint>

#include "kernels/cpu/simd/level.h"

namespace moemamba {

// One row of NormForward. mean and bias are null for the RMS norm; residual may be null.
struct NormForwardRow {
  const float *x, *residual, *weight, *bias;
  float *sum, *y, *mean, *rstd;
  int64_t count;
  float eps;
};

// One row of NormBackward, which adds to dweight and dbias. mean and dbias are null for the RMS
// norm; dsum may be null.
struct NormBackwardRow {
  const float *dy, *x, *weight, *mean, *rstd, *dsum;
  float *dx, *dweight, *dbias;
  int64_t count;
};

struct NormKernels {
  void (*forward)(const NormForwardRow& row);
  void (*backward)(const NormBackwardRow& row);
  // out[i] (+)= the sum over b of parts[b * stride + i], in the order of b.
  void (*sum_blocks)(const float* parts, int64_t blocks, int64_t stride, float* out, int64_t count,
                     bool accumulate);
};
namespace avx2 {
extern const NormKernels norm_kernels;
}
namespace avx512 {
extern const NormKernels norm_kernels;
}
const NormKernels& norm_kernels(SimdLevel level);

}  // namespace moemamba
