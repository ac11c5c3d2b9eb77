#include "kernels/cpu/simd/norm.h"

#include "kernels/cpu/simd/loops.h"

namespace moemamba::MOEMAMBA_SIMD {

namespace {

// Lanes beyond the row are set to zero, so that they do not count in a sum.
Lanes existing(Lanes a, Whole) {
  return a;
}
Lanes existing(Lanes a, Part part) {
  float lanes[16];
  store(lanes, a);
  return load(lanes, part);
}

// Three passes over a row that stays in the cache: sum, spread, output.
void forward(const NormForwardRow& row) {
  const float* s = row.x;
  Lanes total = all(0.f);
  for_lanes(row.count, [&](int64_t i, auto part) {
    Lanes a = load(row.x + i, part);
    if (row.residual) {
      a = a + load(row.residual + i, part);
      store(row.sum + i, a, part);
    }
    total = total + a;
  });
  if (row.residual) s = row.sum;
  const float mean = row.mean ? sum(total) / float(row.count) : 0.f;
  Lanes squares = all(0.f);
  for_lanes(row.count, [&](int64_t i, auto part) {
    const Lanes a = existing(load(s + i, part) - all(mean), part);
    squares = fma(a, a, squares);
  });
  const float rstd = 1.f / __builtin_sqrtf(sum(squares) / float(row.count) + row.eps);
  for_lanes(row.count, [&](int64_t i, auto part) {
    const Lanes normal = (load(s + i, part) - all(mean)) * all(rstd);
    const Lanes bias = row.bias ? load(row.bias + i, part) : all(0.f);
    store(row.y + i, fma(normal, load(row.weight + i, part), bias), part);
  });
  if (row.mean) *row.mean = mean;
  *row.rstd = rstd;
}

// With n = (x - mean) rstd and g = dy weight:
//   dx = rstd (g - mean(g) - n mean(g n)),   without mean(g) for the RMS norm.
void backward(const NormBackwardRow& row) {
  const Lanes mean = all(row.mean ? *row.mean : 0.f), rstd = all(*row.rstd);
  Lanes total = all(0.f), projected = all(0.f);
  for_lanes(row.count, [&](int64_t i, auto part) {
    const Lanes dy = load(row.dy + i, part);  // zero beyond the row, so that nothing counts there
    const Lanes n = (load(row.x + i, part) - mean) * rstd;
    const Lanes g = dy * load(row.weight + i, part);
    total = total + g;
    projected = fma(g, n, projected);
    store(row.dweight + i, fma(dy, n, load(row.dweight + i, part)), part);
    if (row.dbias) store(row.dbias + i, dy + load(row.dbias + i, part), part);
  });
  const Lanes mean_g = all(row.mean ? sum(total) / float(row.count) : 0.f);
  const Lanes mean_gn = all(sum(projected) / float(row.count));
  for_lanes(row.count, [&](int64_t i, auto part) {
    const Lanes n = (load(row.x + i, part) - mean) * rstd;
    const Lanes g = load(row.dy + i, part) * load(row.weight + i, part);
    const Lanes dx = rstd * (g - mean_g - n * mean_gn);
    store(row.dx + i, row.dsum ? dx + load(row.dsum + i, part) : dx, part);
  });
}

void sum_blocks(const float* parts, int64_t blocks, int64_t stride, float* out, int64_t count,
                bool accumulate) {
  for_lanes(count, [=](int64_t i, auto part) {
    Lanes total = accumulate ? load(out + i, part) : all(0.f);
    for (int64_t b = 0; b < blocks; ++b) total = total + load(parts + b * stride + i, part);
    store(out + i, total, part);
  });
}

}  // namespace

const NormKernels norm_kernels{.forward = forward, .backward = backward, .sum_blocks = sum_blocks};

}  // namespace moemamba::MOEMAMBA_SIMD
