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

// 2^(j / 8) from a table, where `shifted` = kShift + j / 8, whose low bits are j. The table's
// entries lack what adding j 2^20 to their bits puts into the fraction.
inline constexpr float kShift = 1572864.f;  // 1.5 * 2^20: adding it rounds to a multiple of 1/8
alignas(64) inline constexpr uint32_t kEighths[16] = {
    0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7,
    0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
#if defined(__AVX512F__)
inline Lanes power_of_eighths(Lanes shifted) {
  const __m512i j = _mm512_castps_si512(shifted.v);
  const __m512i root = _mm512_permutexvar_epi32(j, _mm512_load_si512(kEighths));
  return {_mm512_castsi512_ps(_mm512_add_epi32(root, _mm512_slli_epi32(j, 20)))};
}
inline __m256 low_half_plus_high(Lanes a) {
  return _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
}
#else
inline __m256 power_of_eighths(__m256 shifted) {
  const __m256i table = _mm256_load_si256(reinterpret_cast<const __m256i*>(kEighths));
  const __m256i j = _mm256_castps_si256(shifted);
  const __m256i root = _mm256_permutevar8x32_epi32(table, j);
  return _mm256_castsi256_ps(_mm256_add_epi32(root, _mm256_slli_epi32(j, 20)));
}
inline Lanes power_of_eighths(Lanes shifted) {
  return {power_of_eighths(shifted.lo), power_of_eighths(shifted.hi)};
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

// 2^(j / 8 + r), |r| <= 1/16: 2^(j / 8) (1 + r q(r)), q interpolated at Chebyshev points. Off by at
// most 4e-8 before rounding, and by 6e-7 |r| near r = 0, so that a decay near 1 keeps the precision
// of 1 - decay. The multiply units bind the scan: this takes 4 of them, a polynomial alone 5.
inline Lanes power_of_sum(Lanes shifted, Lanes r) {
  const Lanes power = power_of_eighths(shifted);
  const Lanes q = fma(fma(all(0.0555080138f), r, all(0.240254685f)), r, all(0.693147182f));
  return fma(power * r, q, power);
}

// 2^(delta rate). Unless kSteep, REQUIRES: -125 <= delta rate <= 125.
template <bool kSteep>
inline Lanes decay(Lanes delta, Lanes rate) {
  Lanes x = delta * rate;
  if constexpr (kSteep) x = max(x, all(-kSteepest));
  const Lanes shifted = x + all(kShift);
  return power_of_sum(shifted, x - (shifted - all(kShift)));
}

// e^x to 2e-7, even where |x| is large; x is taken as -86.6 .. 86.6.
inline Lanes exp_within_range(Lanes x) {
  x = min(max(x, all(-86.6f)), all(86.6f));
  const Lanes shifted = fma(x, all(kLog2e), all(kShift));
  const Lanes eighths = shifted - all(kShift);
  const Lanes lost = all(1.92596299e-8f);  // log2(e) - kLog2e
  return power_of_sum(shifted, fma(x, lost, fma(x, all(kLog2e), all(0.f) - eighths)));
}
inline Lanes logistic(Lanes x) {
  return all(1.f) / (all(1.f) + exp_within_range(all(0.f) - x));
}
inline Lanes silu(Lanes x) {
  return x / (all(1.f) + exp_within_range(all(0.f) - x));
}

// log(1 + e^x), relatively exact also where it is tiny:
//   max(x, 0) + log1p(w),  w = e^-|x|,  log1p(w) = 2 atanh(s),  s = w / (2 + w) <= 1/3.
// From x = 17 on, e^-x is lost in f32 and the result is x.
inline Lanes softplus(Lanes x) {
  const Lanes zero = all(0.f);
  const Lanes w = exp_within_range(min(x, zero - x));
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

// Asks for the same channels some tokens away (past the ends it does nothing): a block's rows lie
// far apart, which the processor's own prefetching does not see through.
inline const void* tokens_away(const float* row, int64_t stride, int64_t tokens) {
  const int64_t bytes = stride * tokens * int64_t(sizeof(float));
  return reinterpret_cast<const void*>(reinterpret_cast<intptr_t>(row) + bytes);
}
inline void ask_for(const Source& rows, const float* row, int64_t tokens) {
  __builtin_prefetch(tokens_away(row, rows.stride, tokens), 0, 2);
}
inline void ask_for(const Target& rows, const float* row, int64_t tokens) {
  __builtin_prefetch(tokens_away(row, rows.stride, tokens), 1, 2);
}

// delta, delta u and skip u (where p begins) of a chunk; asks for the chunk `ahead` tokens away.
// True where a decay may fall below 2^-125.
template <int ahead, class Step>
inline bool prepare_steps(const ScanInputs& in, const ScanPlace& place, const float* rates,
                          Step* steps) {
  const Lanes bias = load_channels(in.dt_bias + place.channel, place.channels);
  const Lanes skip = load_channels(in.skip + place.channel, place.channels);
  Lanes largest = all(0.f);
  for (int t = 0; t < place.steps; ++t) {
    const float* dt = at(in.dt, place.token + t, place.channel);
    const float* u = at(in.u, place.token + t, place.channel);
    ask_for(in.dt, dt, ahead);
    ask_for(in.u, u, ahead);
    const Lanes delta = softplus(load_channels(dt, place.channels) + bias);
    const Lanes input = load_channels(u, place.channels);
    largest = max(delta, largest);
    store(steps[t].delta, delta);
    store(steps[t].du, delta * input);
    store(steps[t].p, skip * input);
  }
  const Lanes steepest = largest * load(rates + in.N * kScanLanes);
  return sum_lanes(select_greater(steepest, all(kSteepest), all(1.f), all(0.f))) > 0;
}

}  // namespace moemamba::MOEMAMBA_SIMD
