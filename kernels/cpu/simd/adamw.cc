#include "kernels/cpu/simd/adamw.h"

#include "kernels/cpu/simd/loops.h"

namespace moemamba::MOEMAMBA_SIMD {

namespace {

void update(const AdamWPart& p) {
  for_lanes(p.count, [&](int64_t i, auto part) {
    const Lanes g = all(p.clip) * load(p.gradient + i, part);
    const Lanes m = fma(all(p.beta1), load(p.m + i, part), all(p.one_minus_beta1) * g);
    const Lanes v = fma(all(p.beta2), load(p.v + i, part), all(p.one_minus_beta2) * (g * g));
    const Lanes divisor = fma(sqrt(v), all(p.root_bias), all(p.eps));
    const Lanes kept = load(p.value + i, part) * all(p.keep);
    store(p.value + i, kept - all(p.step_size) * (m / divisor), part);
    store(p.m + i, m, part);
    store(p.v + i, v, part);
  });
}

// gcc and clang split these vectors into what the instruction set has.
typedef float Floats __attribute__((vector_size(32), aligned(4), may_alias));
typedef double Doubles __attribute__((vector_size(64)));

void add_squares(const float* x, Doubles& sum) {
  const Doubles wide = __builtin_convertvector(*reinterpret_cast<const Floats*>(x), Doubles);
  sum = sum + wide * wide;
}

// Four chains of additions, so that their latency does not bind.
double sum_of_squares(const float* x, int64_t count) {
  Doubles a{}, b{}, c{}, d{};
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    add_squares(x + i, a);
    add_squares(x + i + 8, b);
    add_squares(x + i + 16, c);
    add_squares(x + i + 24, d);
  }
  Doubles sums = (a + b) + (c + d);
  for (int64_t lane = 0; i < count; ++i, lane = (lane + 1) % 8)
    sums[lane] = sums[lane] + double(x[i]) * double(x[i]);
  return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

}  // namespace

const AdamWKernels adamw_kernels{.update = update, .sum_of_squares = sum_of_squares};

}  // namespace moemamba::MOEMAMBA_SIMD
