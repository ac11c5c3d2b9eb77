#pragma once

namespace moemamba {

// The instruction set that the vector kernels use on this machine, from cpuid. The results are the
// same bits on both: 16 lanes, the same operations in the same order.
enum class SimdLevel { avx2, avx512 };
SimdLevel simd_level();  // Error on a processor without AVX2 and FMA
const char* name_of(SimdLevel level);

}  // namespace moemamba
