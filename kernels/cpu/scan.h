#pragma once
#include "kernels/cpu/simd/level.h"
#include "kernels/scan.h"

namespace moemamba {

// run_cpu() on a chosen instruction set, for tests and benchmarks.
void run_cpu(Stream&, const ScanForward&, SimdLevel);
void run_cpu(Stream&, const ScanBackward&, SimdLevel);

}  // namespace moemamba
