#pragma once
#include "kernels/conv.h"
#include "kernels/cpu/simd/level.h"

namespace moemamba {

// run_cpu() on a chosen instruction set, for tests and benchmarks.
void run_cpu(Stream&, const ConvForward&, SimdLevel);
void run_cpu(Stream&, const ConvBackward&, SimdLevel);

}  // namespace moemamba
