#include "kernels/cpu/simd/pointwise.h"

#include "kernels/cpu/simd/loops.h"

namespace moemamba::MOEMAMBA_SIMD {

namespace {

// max(0, NaN) is the second operand, NaN: a broken input is not hidden.
void relu_forward(const float* x, float* y, int64_t count) {
  for_lanes(count,
            [=](int64_t i, auto part) { store(y + i, max(all(0.f), load(x + i, part)), part); });
}
void relu_backward(const float* x, const float* dy, float* dx, int64_t count) {
  for_lanes(count, [=](int64_t i, auto part) {
    const Lanes zero = all(0.f);
    store(dx + i, select_greater(load(x + i, part), zero, load(dy + i, part), zero), part);
  });
}

struct Normal {
  Lanes cumulative, density;
};
// The standard normal distribution: erfc(z) = exp(-z^2) t Q(t), t = 1 / (1 + z / 2), z >= 0, with Q
// fitted on z <= 10; relative error below 1e-7 besides that of exp.
Normal normal(Lanes x) {
  const Lanes z = max(all(0.f) - x, x) * all(0.70710678f);
  const Lanes t = all(1.f) / fma(z, all(0.5f), all(1.f));
  Lanes q = fma(all(-0.059714919f), t, all(0.28776831f));
  q = fma(q, t, all(-0.493863649f));
  q = fma(q, t, all(0.28569771f));
  q = fma(q, t, all(-0.0318417574f));
  q = fma(q, t, all(0.204853655f));
  q = fma(q, t, all(0.242572893f));
  q = fma(q, t, all(0.282445042f));
  q = fma(q, t, all(0.282082674f));
  const Lanes decay = exp(all(-0.5f) * (x * x));
  const Lanes tail = all(0.5f) * (decay * (t * q));
  return {select_greater(x, all(0.f), all(1.f) - tail, tail), decay * all(0.398942280f)};
}
void gelu_forward(const float* x, float* y, int64_t count) {
  for_lanes(count, [=](int64_t i, auto part) {
    const Lanes a = load(x + i, part);
    store(y + i, a * normal(a).cumulative, part);
  });
}
void gelu_backward(const float* x, const float* dy, float* dx, int64_t count) {
  for_lanes(count, [=](int64_t i, auto part) {
    const Lanes a = load(x + i, part);
    const Normal n = normal(a);
    store(dx + i, load(dy + i, part) * fma(a, n.density, n.cumulative), part);
  });
}

// d silu(x) / dx = s (1 + x (1 - s)), s = sigmoid(x)
Lanes silu_slope(Lanes x, Lanes s) {
  return s * fma(x, all(1.f) - s, all(1.f));
}
void silu_forward(const float* x, float* y, int64_t count) {
  for_lanes(count, [=](int64_t i, auto part) {
    const Lanes a = load(x + i, part);
    store(y + i, a * sigmoid(a), part);
  });
}
void silu_backward(const float* x, const float* dy, float* dx, int64_t count) {
  for_lanes(count, [=](int64_t i, auto part) {
    const Lanes a = load(x + i, part);
    store(dx + i, load(dy + i, part) * silu_slope(a, sigmoid(a)), part);
  });
}

void swiglu_forward(const float* gate, const float* up, float* y, int64_t count) {
  for_lanes(count, [=](int64_t i, auto part) {
    const Lanes g = load(gate + i, part);
    store(y + i, g * sigmoid(g) * load(up + i, part), part);
  });
}
void swiglu_backward(const float* gate, const float* up, const float* dy, float* dgate, float* dup,
                     int64_t count) {
  for_lanes(count, [=](int64_t i, auto part) {
    const Lanes g = load(gate + i, part), u = load(up + i, part), d = load(dy + i, part);
    const Lanes s = sigmoid(g);
    store(dgate + i, d * u * silu_slope(g, s), part);
    store(dup + i, d * (g * s), part);
  });
}

void add(const float* a, const float* b, float* out, int64_t count) {
  for_lanes(count, [=](int64_t i, auto part) {
    store(out + i, load(a + i, part) + load(b + i, part), part);
  });
}

}  // namespace

const PointwiseKernels pointwise_kernels{
    .forward = {relu_forward, gelu_forward, silu_forward},
    .backward = {relu_backward, gelu_backward, silu_backward},
    .swiglu_forward = swiglu_forward,
    .swiglu_backward = swiglu_backward,
    .add = add,
};

}  // namespace moemamba::MOEMAMBA_SIMD
