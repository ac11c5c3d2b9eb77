#include "kernels/cpu/simd/sha256.h"

#include <immintrin.h>

namespace moemamba::MOEMAMBA_SIMD {

namespace {

// The first 32 bits of the fractions of the cube roots of the first 64 primes (FIPS 180-4).
constexpr uint32_t kRounds[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

// The eight words a .. h as the instructions want them, from the highest lane: {a b e f}, {c d g
// h}.
struct State {
  __m128i abef, cdgh;
};

[[gnu::target("sha")]] inline State load_state(const uint32_t* words) {
  const __m128i* from = reinterpret_cast<const __m128i*>(words);
  const __m128i badc = _mm_shuffle_epi32(_mm_loadu_si128(from), 0xb1);
  const __m128i hgfe = _mm_shuffle_epi32(_mm_loadu_si128(from + 1), 0x1b);
  return {_mm_alignr_epi8(badc, hgfe, 8), _mm_blend_epi16(hgfe, badc, 0xf0)};
}

[[gnu::target("sha")]] inline void store_state(const State& state, uint32_t* words) {
  __m128i* to = reinterpret_cast<__m128i*>(words);
  const __m128i feba = _mm_shuffle_epi32(state.abef, 0x1b);
  const __m128i dchg = _mm_shuffle_epi32(state.cdgh, 0xb1);
  _mm_storeu_si128(to, _mm_blend_epi16(feba, dchg, 0xf0));
  _mm_storeu_si128(to + 1, _mm_alignr_epi8(dchg, feba, 8));
}

// Four rounds of every message in turn; while one message's instruction is under way, the next
// message's begins. The words of the message for later rounds are made on the way.
template <int kChains>
[[gnu::target("sha")]] void sha256_blocks(uint32_t* const* states, const uint8_t* const* data,
                                          size_t blocks) {
  const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  State sums[kChains];
  for (int c = 0; c < kChains; ++c) sums[c] = load_state(states[c]);
  for (size_t block = 0; block < blocks; ++block) {
    __m128i words[kChains][4];
    State now[kChains];
    for (int c = 0; c < kChains; ++c) {
      now[c] = sums[c];
      const __m128i* from = reinterpret_cast<const __m128i*>(data[c] + 64 * block);
      for (int i = 0; i < 4; ++i)
        words[c][i] = _mm_shuffle_epi8(_mm_loadu_si128(from + i), big_endian);
    }
#pragma GCC unroll 16
    for (int round = 0; round < 16; ++round) {
      const __m128i constants =
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(kRounds + 4 * round));
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) {
        __m128i& w0 = words[c][round & 3];
        const __m128i &w1 = words[c][(round + 1) & 3], &w2 = words[c][(round + 2) & 3],
                      &w3 = words[c][(round + 3) & 3];
        const __m128i sum = _mm_add_epi32(w0, constants);
        now[c].cdgh = _mm_sha256rnds2_epu32(now[c].cdgh, now[c].abef, sum);
        now[c].abef = _mm_sha256rnds2_epu32(now[c].abef, now[c].cdgh, _mm_shuffle_epi32(sum, 0x0e));
        if (round < 12)
          w0 = _mm_sha256msg2_epu32(
              _mm_add_epi32(_mm_sha256msg1_epu32(w0, w1), _mm_alignr_epi8(w3, w2, 4)), w3);
      }
    }
    for (int c = 0; c < kChains; ++c)
      sums[c] = {_mm_add_epi32(sums[c].abef, now[c].abef),
                 _mm_add_epi32(sums[c].cdgh, now[c].cdgh)};
  }
  for (int c = 0; c < kChains; ++c) store_state(sums[c], states[c]);
}

}  // namespace

const Sha256Kernels sha256_kernels{.two = sha256_blocks<2>, .three = sha256_blocks<3>};

}  // namespace moemamba::MOEMAMBA_SIMD
