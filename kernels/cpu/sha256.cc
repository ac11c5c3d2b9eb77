#include "kernels/sha256.h"

#include <cpuid.h>

#include "core/error.h"
#include "kernels/cpu/simd/sha256.h"

namespace moemamba {

bool can_chain_sha256() {
  static const bool can = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (b >> 29 & 1) != 0;
  }();
  return can;
}

const Sha256Kernels& sha256_kernels(SimdLevel level) {
  return level == SimdLevel::avx512 ? avx512::sha256_kernels : avx2::sha256_kernels;
}

void sha256_blocks(int chains, uint32_t* const* states, const uint8_t* const* data, size_t blocks) {
  check(chains == 2 || chains == 3, "sha256_blocks: expected 2 or 3 chains, found ", chains);
  check(can_chain_sha256(), "sha256_blocks: this processor has no SHA-256 instructions");
  const Sha256Kernels& kernels = sha256_kernels(simd_level());
  (chains == 2 ? kernels.two : kernels.three)(states, data, blocks);
}

}  // namespace moemamba
