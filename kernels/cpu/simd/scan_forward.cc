#include "kernels/cpu/simd/scan_parts.h"

namespace moemamba::MOEMAMBA_SIMD {

namespace {

using Step = ScanForwardScratch::Step;

// kWidth states from n on over the chunk: state in registers, time in order, p added up over n.
// Bound by the multiply units: 8 of about 16 operations a state and step.
template <int kWidth, bool kSteep>
void pass(const ScanInputs& in, const ScanPlace& place, const float* rates, int64_t n, Step* steps,
          float* state) {
  Lanes h[kWidth], rate[kWidth];
#pragma GCC unroll 8
  for (int i = 0; i < kWidth; ++i) {
    h[i] = load(state + (n + i) * kScanLanes);
    rate[i] = load(rates + (n + i) * kScanLanes);
  }
  const uint8_t* starts = in.starts ? in.starts + place.token : nullptr;
  const float* b = at(in.b, place.token, n);
  const float* c = at(in.c, place.token, n);
  const int64_t b_stride = in.b.stride, c_stride = in.c.stride;
  const int count = place.steps;
  for (int t = 0; t < count; ++t, b += b_stride, c += c_stride) {
    if (starts && starts[t])
#pragma GCC unroll 8
      for (int i = 0; i < kWidth; ++i) h[i] = all(0.f);
    const Lanes delta = load(steps[t].delta), du = load(steps[t].du);
    Lanes p = load(steps[t].p);
#pragma GCC unroll 8
    for (int i = 0; i < kWidth; ++i) {
      h[i] = fma(decay<kSteep>(delta, rate[i]), h[i], du * all(b[i]));
      p = fma(all(c[i]), h[i], p);
    }
    store(steps[t].p, p);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kWidth; ++i) store(state + (n + i) * kScanLanes, h[i]);
}

template <bool kSteep>
void all_states(const ScanInputs& in, const ScanPlace& place, const float* rates, Step* steps,
                float* state) {
  int64_t n = 0;
  for (; n + kScanWidth <= in.N; n += kScanWidth)
    pass<kScanWidth, kSteep>(in, place, rates, n, steps, state);
  for (; n < in.N; ++n) pass<1, kSteep>(in, place, rates, n, steps, state);
}

void chunk(const ScanForwardCall& call, const ScanPlace& place, const float* rates, Step* steps,
           float* state) {
  const ScanInputs& in = call.in;
  const bool steep = prepare_steps<kScanSteps>(in, place, rates, steps);
  if (steep)
    all_states<true>(in, place, rates, steps, state);
  else
    all_states<false>(in, place, rates, steps, state);
  for (int t = 0; t < place.steps; ++t) {
    Lanes y = load(steps[t].p);
    if (in.z.data) {
      const float* row = at(in.z, place.token + t, place.channel);
      ask_for(in.z, row, kScanSteps);
      const Lanes z = load_channels(row, place.channels);
      y = y * silu(z);
    }
    float* row = at(call.y, place.token + t, place.channel);
    store_channels(row, y, place.channels);
    ask_for(call.y, row, kScanSteps);
  }
}

void scan_rates(const Source& a_log, int64_t D, int64_t N, int64_t block, float* rates) {
  const int64_t channel = block * kScanLanes;
  Lanes steepest = all(0.f);
  for (int64_t n = 0; n < N; ++n) {
    float column[kScanLanes] = {};
    for (int lane = 0; lane < kScanLanes && channel + lane < D; ++lane)
      column[lane] = *at(a_log, channel + lane, n);
    const Lanes size = exp_within_range(load(column)) * all(kLog2e);
    store(rates + n * kScanLanes, all(0.f) - size);
    steepest = max(steepest, size);
  }
  store(rates + N * kScanLanes, steepest);
}

}  // namespace

void scan_forward(const ScanForwardCall& call, int64_t sequence, int64_t group,
                  ScanForwardScratch& scratch) {
  const ScanInputs& in = call.in;
  const int64_t first = group * in.blocks / in.groups;
  const int64_t end = (group + 1) * in.blocks / in.groups;
  const int64_t chunks = (in.L + kScanSteps - 1) / kScanSteps;
  const int64_t size = in.N * kScanLanes;
  for (int64_t block = first; block < end; ++block)
    load_states(in, in.initial, sequence, block, scratch.state + (block - first) * size);
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t done = i * kScanSteps;
    const int steps = in.L - done < kScanSteps ? int(in.L - done) : kScanSteps;
    for (int64_t block = first; block < end; ++block) {
      float* state = scratch.state + (block - first) * size;
      if (call.states) {
        float* kept = call.states + ((sequence * chunks + i) * in.blocks + block) * size;
        for (int64_t k = 0; k < size; k += kScanLanes) store(kept + k, load(state + k));
      }
      const ScanPlace place{sequence * in.L + done, block * kScanLanes, steps,
                            channels_of_block(in.D, block)};
      chunk(call, place, rates_of_block(in, block), scratch.steps, state);
    }
  }
  if (!call.final.data) return;
  for (int64_t block = first; block < end; ++block)
    store_states(in, scratch.state + (block - first) * size, sequence, block, call.final);
}

const ScanKernels scan_kernels = {
    .rates = scan_rates, .forward = scan_forward, .backward = scan_backward};

}  // namespace moemamba::MOEMAMBA_SIMD
