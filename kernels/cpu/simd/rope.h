#pragma once
#include <cstdint>

#include "kernels/cpu/simd/level.h"

namespace moemamba {

// One row of Rope: `heads` heads of 2 `half` floats each. y may be x.
struct RopeRow {
  const float *x, *cosines, *sines;  // [heads][2 half], [half], [half]
  float* y;
  int64_t heads, half;
  bool inverse;
};

struct RopeKernels {
  void (*rotate)(const RopeRow& row);
};
namespace avx2 {
extern const RopeKernels rope_kernels;
}
namespace avx512 {
extern const RopeKernels rope_kernels;
}
const RopeKernels& rope_kernels(SimdLevel level);

}  // namespace moemamba
