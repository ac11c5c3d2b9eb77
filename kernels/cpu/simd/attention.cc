#include "kernels/cpu/simd/attention.h"

#include "kernels/cpu/simd/loops.h"

namespace moemamba::MOEMAMBA_SIMD {

namespace {

constexpr float kLow = -__builtin_inff();

// Added to lanes: nothing to the first `count`, -inf to the others, which then do not count in a
// maximum and (but for 2^-126) in a sum of exponentials.
Lanes only_first(Lanes a, Whole) {
  return a;
}
Lanes only_first(Lanes a, Part part) {
  static constexpr float edge[32] = {0,    0,    0,    0,    0,    0,    0,    0,
                                     0,    0,    0,    0,    0,    0,    0,    0,
                                     kLow, kLow, kLow, kLow, kLow, kLow, kLow, kLow,
                                     kLow, kLow, kLow, kLow, kLow, kLow, kLow, kLow};
  return a + load(edge + 16 - part.count);
}

float greatest_lane(Lanes a) {
  float lanes[16];
  store(lanes, a);
  float most = lanes[0];
  for (float lane : lanes) most = lane > most ? lane : most;
  return most;
}

float exp_of(float x) {
  float lanes[16];
  store(lanes, exp(all(x)));
  return lanes[0];
}

void scale(float* y, float w, int64_t width) {
  for_lanes(width, [&](int64_t i, auto part) { store(y + i, all(w) * load(y + i, part), part); });
}

float dot(const float* x, const float* y, int64_t width) {
  Lanes total = all(0.f);
  for_lanes(width, [&](int64_t i, auto part) {
    total = fma(load(x + i, part), load(y + i, part), total);
  });
  return sum(total);
}

void clear(float* p, int64_t count) {
  for_lanes(count, [&](int64_t i, auto part) { store(p + i, all(0.f), part); });
}

void clear_hidden(float* p, const ScoreRow& row) {
  clear(p, row.begin);
  clear(p + row.end, row.keys - row.end);
}

void soften(const ScoreRow& row, float* greatest, float* total, float* y, int64_t width) {
  clear_hidden(row.scores, row);
  if (row.begin == row.end) return;
  float* s = row.scores + row.begin;
  const int64_t count = row.end - row.begin;
  Lanes most = all(kLow);
  for_lanes(count,
            [&](int64_t i, auto part) { most = max(most, only_first(load(s + i, part), part)); });
  const float tile = greatest_lane(most) * row.scale;
  const float now = tile > *greatest ? tile : *greatest;
  Lanes sums = all(0.f);
  for_lanes(count, [&](int64_t i, auto part) {
    const Lanes p = exp(fma(only_first(load(s + i, part), part), all(row.scale), all(-now)));
    sums = sums + p;
    store(s + i, p, part);
  });
  if (now > *greatest) {
    const float factor = exp_of(*greatest - now);
    if (*total != 0) scale(y, factor, width);
    *total *= factor;
    *greatest = now;
  }
  *total += sum(sums);
}

void backward(const ScoreRow& row, float* dp, float lse, float delta) {
  clear_hidden(row.scores, row);
  clear_hidden(dp, row);
  float* s = row.scores + row.begin;
  float* d = dp + row.begin;
  for_lanes(row.end - row.begin, [&](int64_t i, auto part) {
    const Lanes p = exp(fma(load(s + i, part), all(row.scale), all(-lse)));
    store(s + i, p, part);
    store(d + i, all(row.scale) * p * (load(d + i, part) - all(delta)), part);
  });
}

}  // namespace

const AttentionKernels attention_kernels{
    .soften = soften, .scale = scale, .dot = dot, .backward = backward};

}  // namespace moemamba::MOEMAMBA_SIMD
