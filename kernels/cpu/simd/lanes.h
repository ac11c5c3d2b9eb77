#pragma once
// 16 float lanes on either instruction set, for the files of this folder alone. Each of them is
// compiled twice, with MOEMAMBA_SIMD = avx2 and = avx512, and puts everything that it defines into
// namespace moemamba::MOEMAMBA_SIMD, so that no code for the newer processor has a name that the
// linker could pick for the older one. Nothing else may be included here.
#include <immintrin.h>

#include <cstdint>

namespace moemamba::MOEMAMBA_SIMD {

#if defined(__AVX512F__)
struct Lanes {
  __m512 v;
};
inline Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Lanes a) { _mm512_storeu_ps(p, a.v); }
inline Lanes all(float x) { return {_mm512_set1_ps(x)}; }
// The first `count` lanes (0 .. 16); the others are 0 and are not read or written.
inline Lanes load(const float* p, int count) {
  return {_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1u), p)};
}
inline void store(float* p, Lanes a, int count) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1u), a.v);
}
inline Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes operator/(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Lanes min(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Lanes max(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Lanes sqrt(Lanes a) { return {_mm512_sqrt_ps(a.v)}; }
inline Lanes round(Lanes a) { return {_mm512_roundscale_ps(a.v, 8)}; }  // to nearest, ties to even
// 2^i for integral i in -126 .. 127.
inline Lanes power_of_two(Lanes i) {
  const __m512i e = _mm512_add_epi32(_mm512_cvtps_epi32(i.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(e, 23))};
}
// where a > b: x, else y.
inline Lanes select_greater(Lanes a, Lanes b, Lanes x, Lanes y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), y.v, x.v)};
}
#else
struct Lanes {
  __m256 lo, hi;
};
inline Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Lanes a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline Lanes all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline __m256i mask_below(int count, int first) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count - first), lane);
}
inline Lanes load(const float* p, int count) {
  return {_mm256_maskload_ps(p, mask_below(count, 0)),
          _mm256_maskload_ps(p + 8, mask_below(count, 8))};
}
inline void store(float* p, Lanes a, int count) {
  _mm256_maskstore_ps(p, mask_below(count, 0), a.lo);
  _mm256_maskstore_ps(p + 8, mask_below(count, 8), a.hi);
}
inline Lanes operator+(Lanes a, Lanes b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
inline Lanes operator-(Lanes a, Lanes b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
inline Lanes operator*(Lanes a, Lanes b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
inline Lanes operator/(Lanes a, Lanes b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline Lanes min(Lanes a, Lanes b) {
  return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}
inline Lanes max(Lanes a, Lanes b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
inline Lanes sqrt(Lanes a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
inline Lanes round(Lanes a) { return {_mm256_round_ps(a.lo, 8), _mm256_round_ps(a.hi, 8)}; }
inline __m256 power_of_two(__m256 i) {
  const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(i), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
}
inline Lanes power_of_two(Lanes i) { return {power_of_two(i.lo), power_of_two(i.hi)}; }
inline Lanes select_greater(Lanes a, Lanes b, Lanes x, Lanes y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ))};
}
#endif

// 2^x: nearest integer + polynomial of degree 6 on [-1/2, 1/2] with constant term exactly 1 (so
// that a decay near 1 keeps its precision); relative error below 2e-7. Clamped to 2^-126 .. 2^127.
// A NaN stays a NaN: min and max return their second argument when either is one.
inline Lanes exp2(Lanes x) {
  x = min(all(127.f), max(all(-126.f), x));
  const Lanes i = round(x);
  const Lanes r = x - i;
  Lanes p = fma(all(1.5403530e-4f), r, all(1.3333558e-3f));
  p = fma(p, r, all(9.6181291e-3f));
  p = fma(p, r, all(5.5504109e-2f));
  p = fma(p, r, all(2.4022651e-1f));
  p = fma(p, r, all(6.9314718e-1f));
  p = fma(p, r, all(1.f));
  return p * power_of_two(i);
}
inline Lanes exp(Lanes x) { return exp2(x * all(1.44269504f)); }
inline Lanes sigmoid(Lanes x) { return all(1.f) / (all(1.f) + exp(all(0.f) - x)); }

// The sum of 16 lanes in one fixed order.
inline float sum(Lanes a) {
  float f[16];
  store(f, a);
  for (int width = 8; width >= 1; width /= 2)
    for (int i = 0; i < width; ++i) f[i] = f[i] + f[i + width];
  return f[0];
}

}  // namespace moemamba::MOEMAMBA_SIMD
