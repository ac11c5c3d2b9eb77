#pragma once
// What the scan's forward and backward share. Only for files of this folder (see lanes.h).
#include "kernels/cpu/simd/channels.h"
#include "kernels/cpu/simd/scan.h"

namespace moemamba::MOEMAMBA_SIMD {

void scan_forward(const ScanForwardCall&, int64_t sequence, int64_t group, ScanForwardScratch&);
void scan_backward(const ScanBackwardCall&, int64_t sequence, int64_t group, ScanBackwardScratch&);

inline constexpr float kLog2e = 1.44269504f;
inline constexpr float kLn2 = 0.69314718f;
inline constexpr float kSteepest = 125.f;  // decays below 2^-125 are taken as 2^-125

// p 2^i, where `shifted` = i + 1.5 * 2^23, whose low bits are i; REQUIRES: a normal result.
#if defined(__AVX512F__)
inline Lanes scale_by_power(Lanes p, Lanes shifted) {
  const __m512i i = _mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p.v), i))};
}
inline __m256 low_half_plus_high(Lanes a) {
  return _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
}
#else
inline __m256 scale_by_power(__m256 p, __m256 shifted) {
  const __m256i i = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), i));
}
inline Lanes scale_by_power(Lanes p, Lanes shifted) {
  return {scale_by_power(p.lo, shifted.lo), scale_by_power(p.hi, shifted.hi)};
}
inline __m256 low_half_plus_high(Lanes a) {
  return _mm256_add_ps(a.lo, a.hi);
}
#endif

// sum() in registers, in its order.
inline float sum_lanes(Lanes a) {
  const __m256 eight = low_half_plus_high(a);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

// 2^(i + r): `shifted` as above, |r| <= 1/2. The polynomial of degree 5 is 1 + r q(r), q
// interpolated at Chebyshev points: off by at most 2e-7, and by 3.2e-7 |r| near 0, so that a decay
// near 1 keeps the precision of 1 - decay.
inline Lanes power_of_sum(Lanes shifted, Lanes r) {
  Lanes p = fma(all(0.00133813021f), r, all(0.00966636837f));
  p = fma(p, r, all(0.0555038117f));
  p = fma(p, r, all(0.240223497f));
  p = fma(p, r, all(0.693147182f));
  p = fma(p, r, all(1.f));
  return scale_by_power(p, shifted);
}
inline constexpr float kShift = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer

// 2^(delta rate). Unless kSteep, REQUIRES: -125 <= delta rate <= 125.
template <bool kSteep>
inline Lanes decay(Lanes delta, Lanes rate) {
  Lanes x = delta * rate;
  if constexpr (kSteep) x = max(x, all(-kSteepest));
  const Lanes shifted = x + all(kShift);
  return power_of_sum(shifted, x - (shifted - all(kShift)));
}

// e^x for x <= 0 to 2e-7, even where x is large; below 2^-125: 2^-125.
inline Lanes exp_of_negative(Lanes x) {
  x = max(x, all(-86.6f));
  const Lanes shifted = fma(x, all(kLog2e), all(kShift));
  const Lanes i = shifted - all(kShift);
  return power_of_sum(shifted, fma(x, all(1.92596299e-8f), fma(x, all(kLog2e), all(0.f) - i)));
}

// log(1 + e^x), relatively exact also where it is tiny:
//   max(x, 0) + log1p(w),  w = e^-|x|,  log1p(w) = 2 atanh(s),  s = w / (2 + w) <= 1/3.
// From x = 17 on, e^-x is lost in f32 and the result is x.
inline Lanes softplus(Lanes x) {
  const Lanes zero = all(0.f);
  const Lanes w = exp_of_negative(min(x, zero - x));
  const Lanes s = w / (all(2.f) + w);
  const Lanes s2 = s * s;
  Lanes q = fma(all(0.134257495f), s2, all(0.141183093f));
  q = fma(q, s2, all(0.200037807f));
  q = fma(q, s2, all(0.333333194f));
  const Lanes twice = s + s;
  return max(x, zero) + fma(twice * s2, q, twice);
}

// Where a task is: one chunk of one sequence and one block of channels.
struct ScanPlace {
  int64_t token;    // first token of the chunk
  int64_t channel;  // first channel of the block
  int steps;
  int channels;  // 1 .. 16
};

inline const float* rates_of_block(const ScanInputs& in, int64_t block) {
  return in.rates + block * (in.N + 1) * kScanLanes;
}

// Between the rows of a [B, D, N] and a block's [N, 16]; channels past D, and all without a source,
// are zero.
inline void load_states(const ScanInputs& in, const Source& from, int64_t sequence, int64_t block,
                        float* to) {
  const int channels = channels_of_block(in.D, block);
  for (int64_t i = 0; i < in.N * kScanLanes; ++i) to[i] = 0;
  if (!from.data) return;
  for (int lane = 0; lane < channels; ++lane) {
    const float* row = at(from, sequence * in.D + block * kScanLanes + lane, 0);
    for (int64_t n = 0; n < in.N; ++n) to[n * kScanLanes + lane] = row[n];
  }
}
inline void store_states(const ScanInputs& in, const float* from, int64_t sequence, int64_t block,
                         const Target& to) {
  const int channels = channels_of_block(in.D, block);
  for (int lane = 0; lane < channels; ++lane) {
    float* row = at(to, sequence * in.D + block * kScanLanes + lane, 0);
    for (int64_t n = 0; n < in.N; ++n) row[n] = from[n * kScanLanes + lane];
  }
}

// Asks for a block's part of a row one chunk ahead (forward) or back: rows lie far apart, which the
// processor's own prefetching does not see through.
inline void ask_for(const float* row, int64_t stride, int64_t tokens) {
  __builtin_prefetch(row + stride * tokens, 0, 2);
}

// delta and delta u of a chunk. True where a decay may fall below 2^-125.
template <class Step>
inline bool prepare_steps(const ScanInputs& in, const ScanPlace& place, const float* rates,
                          Step* steps) {
  const Lanes bias = load_channels(in.dt_bias + place.channel, place.channels);
  Lanes largest = all(0.f);
  for (int t = 0; t < place.steps; ++t) {
    const float* dt = at(in.dt, place.token + t, place.channel);
    const float* u = at(in.u, place.token + t, place.channel);
    ask_for(dt, in.dt.stride, kScanSteps);
    ask_for(u, in.u.stride, kScanSteps);
    const Lanes delta = softplus(load_channels(dt, place.channels) + bias);
    largest = max(delta, largest);
    store(steps[t].delta, delta);
    store(steps[t].du, delta * load_channels(u, place.channels));
  }
  const Lanes steepest = largest * load(rates + in.N * kScanLanes);
  return sum_lanes(select_greater(steepest, all(kSteepest), all(1.f), all(0.f))) > 0;
}

}  // namespace moemamba::MOEMAMBA_SIMD
