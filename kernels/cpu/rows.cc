#include "kernels/cpu/simd/rows.h"

namespace moemamba {

const RowKernels& row_kernels(SimdLevel level) {
  return level == SimdLevel::avx512 ? avx512::row_kernels : avx2::row_kernels;
}

}  // namespace moemamba
