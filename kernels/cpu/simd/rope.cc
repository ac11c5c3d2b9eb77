#include "kernels/cpu/simd/rope.h"

#include "kernels/cpu/simd/loops.h"

namespace moemamba::MOEMAMBA_SIMD {

namespace {

void rotate(const RopeRow& row) {
  const Lanes sign = all(row.inverse ? -1.f : 1.f);
  for (int64_t head = 0; head < row.heads; ++head) {
    const float* x = row.x + head * 2 * row.half;
    float* y = row.y + head * 2 * row.half;
    for_lanes(row.half, [&](int64_t i, auto part) {
      const Lanes cosine = load(row.cosines + i, part), sine = sign * load(row.sines + i, part);
      const Lanes a = load(x + i, part), b = load(x + row.half + i, part);
      store(y + i, a * cosine - b * sine, part);
      store(y + row.half + i, fma(a, sine, b * cosine), part);
    });
  }
}

}  // namespace

const RopeKernels rope_kernels{.rotate = rotate};

}  // namespace moemamba::MOEMAMBA_SIMD
