#pragma once
#include <cstdint>

#include "kernels/cpu/simd/level.h"

namespace moemamba {

// Pointwise loops over `count` elements; outputs may be inputs. Arrays are indexed by Activation.
struct PointwiseKernels {
  void (*forward[3])(const float* x, float* y, int64_t count);
  void (*backward[3])(const float* x, const float* dy, float* dx, int64_t count);
  void (*swiglu_forward)(const float* gate, const float* up, float* y, int64_t count);
  void (*swiglu_backward)(const float* gate, const float* up, const float* dy, float* dgate,
                          float* dup, int64_t count);
  void (*add)(const float* a, const float* b, float* out, int64_t count);
};
namespace avx2 {
extern const PointwiseKernels pointwise_kernels;
}
namespace avx512 {
extern const PointwiseKernels pointwise_kernels;
}
const PointwiseKernels& pointwise_kernels(SimdLevel level);

}  // namespace moemamba
