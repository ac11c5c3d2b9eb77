#include "core/error.h"
#include "kernels/cpu/simd/level.h"

namespace moemamba {

SimdLevel simd_level() {
  static const SimdLevel level = [] {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
      return SimdLevel::avx512;
    check(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"),
          "this processor has neither AVX-512 nor AVX2 with FMA; moemamba needs one of them");
    return SimdLevel::avx2;
  }();
  return level;
}

const char* name_of(SimdLevel level) { return level == SimdLevel::avx512 ? "avx512" : "avx2"; }

}  // namespace moemamba
