#pragma once
#include <cstdint>

#include "kernels/cpu/simd/level.h"

namespace moemamba {

// AdamW on `count` elements, what depends on the step alone computed before.
struct AdamWPart {
  const float* gradient;
  float *value, *m, *v;
  int64_t count;
  float clip;  // factor of the gradient
  float keep;  // 1 - lr decay
  float beta1, one_minus_beta1, beta2, one_minus_beta2;
  float step_size;  // lr / (1 - beta1^step)
  float root_bias;  // 1 / sqrt(1 - beta2^step)
  float eps;
};

struct AdamWKernels {
  void (*update)(const AdamWPart& part);
  // Interleaved f64 sums, added up in one order.
  double (*sum_of_squares)(const float* x, int64_t count);
};
namespace avx2 {
extern const AdamWKernels adamw_kernels;
}
namespace avx512 {
extern const AdamWKernels adamw_kernels;
}
const AdamWKernels& adamw_kernels(SimdLevel level);

}  // namespace moemamba
