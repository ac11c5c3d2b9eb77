#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/cpu/simd/level.h"

namespace moemamba {

// For processors with the SHA-256 instructions, which neither level promises.
struct Sha256Kernels {
  using Blocks = void (*)(uint32_t* const* states, const uint8_t* const* data, size_t blocks);
  Blocks two, three;
};
namespace avx2 {
extern const Sha256Kernels sha256_kernels;
}
namespace avx512 {
extern const Sha256Kernels sha256_kernels;
}
const Sha256Kernels& sha256_kernels(SimdLevel level);

}  // namespace moemamba
