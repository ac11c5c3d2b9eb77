#include "kernels/cpu/simd/rows.h"

#include "kernels/cpu/simd/loops.h"

namespace moemamba::MOEMAMBA_SIMD {

namespace {

void add(float* y, const float* x, int64_t n) {
  for_lanes(n, [&](int64_t i, auto which) {
    store(y + i, load(y + i, which) + load(x + i, which), which);
  });
}

void scale(float* y, float w, const float* x, int64_t n) {
  for_lanes(n, [&](int64_t i, auto which) { store(y + i, all(w) * load(x + i, which), which); });
}

void axpy(float* y, float w, const float* x, int64_t n) {
  for_lanes(n, [&](int64_t i, auto which) {
    store(y + i, fma(all(w), load(x + i, which), load(y + i, which)), which);
  });
}

float dot_and_scale(const float* x, const float* y, float* z, float w, int64_t n) {
  Lanes dot = all(0.f);
  for_lanes(n, [&](int64_t i, auto which) {
    const Lanes xi = load(x + i, which);
    dot = fma(xi, load(y + i, which), dot);
    store(z + i, all(w) * xi, which);
  });
  return sum(dot);
}

Lanes greatest_of(const float* x, Lanes so_far, Whole) { return max(so_far, load(x)); }
Lanes greatest_of(const float* x, Lanes so_far, Part part) {
  for (int lane = 0; lane < part.count; ++lane) so_far = max(so_far, all(x[lane]));
  return so_far;
}

// Lanes past the end must not count: exp() of what a masked load leaves there is not 0.
Lanes only(Lanes a, Whole) { return a; }
Lanes only(Lanes a, Part part) {
  float lanes[16];
  store(lanes, a);
  return load(lanes, part);
}

void exp_sum(const float* x, int64_t n, float* greatest, float* total) {
  Lanes most = all(x[0]);
  for_lanes(n, [&](int64_t i, auto which) { most = greatest_of(x + i, most, which); });
  float lanes[16];
  store(lanes, most);
  float shift = lanes[0];
  for (float lane : lanes) shift = lane > shift ? lane : shift;
  Lanes s = all(0.f);
  for_lanes(n, [&](int64_t i, auto which) {
    s = s + only(exp(load(x + i, which) - all(shift)), which);
  });
  *greatest = shift;
  *total = sum(s);
}

void scaled_exp(float* p, const float* x, float shift, float w, int64_t n) {
  for_lanes(n, [&](int64_t i, auto which) {
    store(p + i, all(w) * exp(load(x + i, which) - all(shift)), which);
  });
}

}  // namespace

const RowKernels row_kernels = {add, scale, axpy, dot_and_scale, exp_sum, scaled_exp};

}  // namespace moemamba::MOEMAMBA_SIMD
