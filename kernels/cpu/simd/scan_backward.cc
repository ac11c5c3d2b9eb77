// The derivation is in docs/operators.md. With g_t = c_t dp_t + a_{t+1} g_{t+1} (over states n):
//   dc_t = sum_d dp h;  db_t = sum_d g delta u;  du = skip dp + delta sum_n g b
//   ddelta = u sum_n g b + sum_n A g a h_{t-1};  dA = sum_t delta g a h_{t-1}
#include "kernels/cpu/simd/scan_parts.h"

namespace moemamba::MOEMAMBA_SIMD {

namespace {

using Scratch = ScanBackwardScratch;

// What a chunk's pass over the states needs: delta, delta u and dp = dy silu(z); its sums begin at
// zero, p at skip u.
bool prepare(const ScanBackwardCall& call, const ScanPlace& place, const float* rates,
             Scratch::Step* steps) {
  const ScanInputs& in = call.in;
  for (int t = 0; t < place.steps; ++t) {
    const float* dy = at(call.dy, place.token + t, place.channel);
    ask_for(call.dy, dy, -kScanSteps);
    Lanes dp = load_channels(dy, place.channels);
    if (in.z.data) {
      const float* z = at(in.z, place.token + t, place.channel);
      ask_for(in.z, z, -kScanSteps);
      dp = dp * silu(load_channels(z, place.channels));
    }
    store(steps[t].dp, dp);
    store(steps[t].sum_gb, all(0.f));
    store(steps[t].sum_rate, all(0.f));
  }
  return prepare_steps<-kScanSteps>(in, place, rates, steps);
}

// The chunk's decays and states again, from the kept state; a decay at a start is zero.
template <int kWidth, bool kSteep>
void recompute(const ScanInputs& in, const ScanPlace& place, const float* rates, const float* kept,
               int64_t n, const Scratch::Step* steps, Scratch::States* states) {
  Lanes h[kWidth], rate[kWidth];
#pragma GCC unroll 8
  for (int i = 0; i < kWidth; ++i) {
    h[i] = load(kept + (n + i) * kScanLanes);
    rate[i] = load(rates + (n + i) * kScanLanes);
    store(states[0].h[i], h[i]);
  }
  const uint8_t* starts = in.starts ? in.starts + place.token : nullptr;
  const float* b = at(in.b, place.token, n);
  const int64_t b_stride = in.b.stride;
  const int count = place.steps;
  for (int t = 0; t < count; ++t, b += b_stride) {
    const Lanes delta = load(steps[t].delta), du = load(steps[t].du);
    const bool start = starts && starts[t];
#pragma GCC unroll 8
    for (int i = 0; i < kWidth; ++i) {
      Lanes a = decay<kSteep>(delta, rate[i]);
      if (start) a = h[i] = all(0.f);
      h[i] = fma(a, h[i], du * all(b[i]));
      store(states[t + 1].decay[i], a);
      store(states[t + 1].h[i], h[i]);
    }
  }
}

// The chunk from its last step to its first.
template <int kWidth>
void reverse(const ScanInputs& in, const ScanPlace& place, const float* rates, int64_t n,
             const Scratch::States* states, Scratch::Step* steps, Scratch::Sums* sums,
             float* carries, float* sum_da) {
  Lanes carry[kWidth], da[kWidth], rate[kWidth], h[kWidth];
#pragma GCC unroll 8
  for (int i = 0; i < kWidth; ++i) {
    carry[i] = load(carries + (n + i) * kScanLanes);
    da[i] = load(sum_da + (n + i) * kScanLanes);
    rate[i] = load(rates + (n + i) * kScanLanes);
    h[i] = load(states[place.steps].h[i]);
  }
  const int64_t b_stride = in.b.stride, c_stride = in.c.stride;
  const float* b = at(in.b, place.token + place.steps - 1, n);
  const float* c = at(in.c, place.token + place.steps - 1, n);
  for (int t = place.steps - 1; t >= 0; --t, b -= b_stride, c -= c_stride) {
    Scratch::Step& step = steps[t];
    const Lanes delta = load(step.delta), du = load(step.du), dp = load(step.dp);
    Lanes p = load(step.p), sum_gb = load(step.sum_gb), sum_rate = load(step.sum_rate);
#pragma GCC unroll 8
    for (int i = 0; i < kWidth; ++i) {
      const Lanes g = fma(all(c[i]), dp, carry[i]);
      store(sums[t].c[i], fma(dp, h[i], load(sums[t].c[i])));
      store(sums[t].b[i], fma(g, du, load(sums[t].b[i])));
      sum_gb = fma(all(b[i]), g, sum_gb);
      p = fma(all(c[i]), h[i], p);
      h[i] = load(states[t].h[i]);
      carry[i] = load(states[t + 1].decay[i]) * g;
      const Lanes gq = carry[i] * h[i];
      sum_rate = fma(rate[i], gq, sum_rate);
      da[i] = fma(delta, gq, da[i]);
    }
    store(step.p, p);
    store(step.sum_gb, sum_gb);
    store(step.sum_rate, sum_rate);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kWidth; ++i) {
    store(carries + (n + i) * kScanLanes, carry[i]);
    store(sum_da + (n + i) * kScanLanes, da[i]);
  }
}

// One chunk of all blocks of a group.
struct GroupChunk {
  const ScanBackwardCall& call;
  int64_t group, first, end;  // blocks
  const float* kept;          // [blocks, N, 16]
  int64_t token;
  int steps;

  ScanPlace place(int64_t block) const {
    return {token, block * kScanLanes, steps, channels_of_block(call.in.D, block)};
  }
};

// kWidth states from n on. Their sums over channels stay in the first-level cache while the blocks
// pass by; then their lanes are added up.
template <int kWidth>
void states_of_group(const GroupChunk& chunk, int64_t n, Scratch& s) {
  const ScanBackwardCall& call = chunk.call;
  const ScanInputs& in = call.in;
  for (int t = 0; t < chunk.steps; ++t)
    for (int i = 0; i < kWidth; ++i) {
      store(s.sums[t].b[i], all(0.f));
      store(s.sums[t].c[i], all(0.f));
    }
  for (int64_t block = chunk.first; block < chunk.end; ++block) {
    const int64_t local = block - chunk.first, base = local * in.N * kScanLanes;
    const ScanPlace place = chunk.place(block);
    const float* rates = rates_of_block(in, block);
    const float* kept = chunk.kept + block * in.N * kScanLanes;
    auto* again = s.steep[local] ? recompute<kWidth, true> : recompute<kWidth, false>;
    again(in, place, rates, kept, n, s.steps[local], s.states);
    reverse<kWidth>(in, place, rates, n, s.states, s.steps[local], s.sums, s.carry + base,
                    s.sum_da + base);
  }
  const int64_t offset = chunk.group * call.group_step;
  for (int t = 0; t < chunk.steps; ++t)
    for (int i = 0; i < kWidth; ++i) {
      at(call.db, chunk.token + t, n + i)[offset] = sum_lanes(load(s.sums[t].b[i]));
      at(call.dc, chunk.token + t, n + i)[offset] = sum_lanes(load(s.sums[t].c[i]));
    }
}

void write(const Target& to, int64_t token, const ScanPlace& place, Lanes value) {
  float* row = at(to, token, place.channel);
  store_channels(row, value, place.channels);
  ask_for(to, row, -kScanSteps);
}

// du, ddt and dz of a chunk, from the sums over states.
void finish(const ScanBackwardCall& call, const ScanPlace& place, const Scratch::Step* steps,
            float* sum_skip, float* sum_bias) {
  const ScanInputs& in = call.in;
  const Lanes skip = load_channels(in.skip + place.channel, place.channels);
  const Lanes bias = load_channels(in.dt_bias + place.channel, place.channels);
  Lanes dskip = load(sum_skip), dbias = load(sum_bias);
  for (int t = place.steps - 1; t >= 0; --t) {
    const int64_t token = place.token + t;
    const Lanes u = load_channels(at(in.u, token, place.channel), place.channels);
    const Lanes dt = load_channels(at(in.dt, token, place.channel), place.channels);
    const Lanes dp = load(steps[t].dp), sum_gb = load(steps[t].sum_gb);
    const Lanes ddelta = fma(u, sum_gb, all(kLn2) * load(steps[t].sum_rate));
    const Lanes ddt = ddelta * logistic(dt + bias);
    const Lanes du = fma(load(steps[t].delta), sum_gb, skip * dp);
    write(call.ddt, token, place, ddt);
    write(call.du, token, place, du);
    dskip = fma(dp, u, dskip);
    dbias = dbias + ddt;
    if (!in.z.data) continue;
    const Lanes z = load_channels(at(in.z, token, place.channel), place.channels);
    const Lanes dy = load_channels(at(call.dy, token, place.channel), place.channels);
    const Lanes s = logistic(z);
    const Lanes slope = s * fma(z, all(1.f) - s, all(1.f));
    write(call.dz, token, place, dy * load(steps[t].p) * slope);
  }
  store(sum_skip, dskip);
  store(sum_bias, dbias);
}

void run_chunk(const GroupChunk& chunk, Scratch& s) {
  const ScanInputs& in = chunk.call.in;
  for (int64_t block = chunk.first; block < chunk.end; ++block) {
    const int64_t local = block - chunk.first;
    s.steep[local] =
        prepare(chunk.call, chunk.place(block), rates_of_block(in, block), s.steps[local]);
  }
  int64_t n = 0;
  for (; n + kScanWidth <= in.N; n += kScanWidth) states_of_group<kScanWidth>(chunk, n, s);
  for (; n < in.N; ++n) states_of_group<1>(chunk, n, s);
  for (int64_t block = chunk.first; block < chunk.end; ++block) {
    const int64_t local = block - chunk.first;
    finish(chunk.call, chunk.place(block), s.steps[local], s.sum_skip[local], s.sum_bias[local]);
  }
}

}  // namespace

void scan_backward(const ScanBackwardCall& call, int64_t sequence, int64_t group, Scratch& s) {
  const ScanInputs& in = call.in;
  const int64_t first = group * in.blocks / in.groups;
  const int64_t end = (group + 1) * in.blocks / in.groups;
  const int64_t chunks = (in.L + kScanSteps - 1) / kScanSteps;
  const int64_t size = in.N * kScanLanes;
  for (int64_t block = first; block < end; ++block) {
    const int64_t local = block - first;
    load_states(in, call.dfinal, sequence, block, s.carry + local * size);
    load_states(in, Source{}, sequence, block, s.sum_da + local * size);
    store(s.sum_skip[local], all(0.f));
    store(s.sum_bias[local], all(0.f));
  }
  for (int64_t i = chunks - 1; i >= 0; --i) {
    const int64_t done = i * kScanSteps;
    const int steps = in.L - done < kScanSteps ? int(in.L - done) : kScanSteps;
    const float* kept = call.states + (sequence * chunks + i) * in.blocks * size;
    run_chunk({call, group, first, end, kept, sequence * in.L + done, steps}, s);
  }
  for (int64_t block = first; block < end; ++block) {
    const int64_t local = block - first;
    float* sums = call.sums + (sequence * in.blocks + block) * (in.N + 2) * kScanLanes;
    for (int64_t k = 0; k < size; k += kScanLanes)
      store(sums + k, load(s.sum_da + local * size + k));
    store(sums + size, load(s.sum_skip[local]));
    store(sums + size + kScanLanes, load(s.sum_bias[local]));
    if (call.dinitial.data)
      store_states(in, s.carry + local * size, sequence, block, call.dinitial);
  }
}

}  // namespace moemamba::MOEMAMBA_SIMD
