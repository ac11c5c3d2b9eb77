#include "kernels/cuda/row_sums.cuh"
#include "kernels/cuda/scan_tiles.cuh"

namespace moemamba {

namespace scan {
namespace {

template <class Real>
struct BackwardCall {
  Inputs<Real> in;
  Strided<Real> dy, du, ddt, dz;
  Strided<float> dfinal, dinitial;
  const float4* states;    // [B, tiles] items, as forward left them
  const float4* entering;  // [B, splits] items, from later parts; null: dfinal enters
  float4 *ends, *decays;   // likewise, for the pass that finds them
  float4* cell_parts;      // [blocks, T, 2, kStates]: db and dc of one block of channels
  float* sums;             // [B, splits, blocks, kSums]: da_log, dskip, ddt_bias
};

// A tile in shared memory. The reverse sweep leaves its sums in the place of what it read.
template <int P>
struct BackwardTile {
  float4 kept[kTile][2][kThreads];       // states before each step; then the thread's dB and dC
  float4 deltas[kTile][Map<P>::kPairs];  // delta of both channels; delta u, then sum_n g b
  float2 dp[kTile][Map<P>::kPairs];      // dp of both channels, then sum_n c h
  float2 rates[kTile][Map<P>::kPairs];   // sum_n rate g a h
  float cells[kTile][2][Map<P>::kStates];

  __device__ float* input(int t, int channel) {
    return reinterpret_cast<float*>(&deltas[t][channel / 2]) + channel % 2 + 2;
  }
  __device__ float* slope(int t, int channel) {
    return reinterpret_cast<float*>(&dp[t][0]) + channel;
  }
  __device__ float* rate(int t, int channel) {
    return reinterpret_cast<float*>(&rates[t][0]) + channel;
  }
  __device__ float4 cell(int t, int which, int p) const {
    return *reinterpret_cast<const float4*>(&cells[t][which][4 * p]);
  }
};

// A thread's elements of a tile as they come from memory.
template <class Real, int P>
struct RawElements {
  Elements<Real, P> u, dt, z, dy;
  Cells<Real, 4 * P> cells;
  __device__ void load(const BackwardCall<Real>& call, const Place<P>& place, int tile) {
    const Inputs<Real>& in = call.in;
    const Span span = place.span(in.s, tile);
    u.load(in.u, place, span, in.in_pairs);
    dt.load(in.dt, place, span, in.in_pairs);
    if (in.z.at) z.load(in.z, place, span, in.in_pairs);
    dy.load(call.dy, place, span, in.in_pairs);
    cells.load(in.b, in.c, in.s.N, span);
  }
};

// What the element-wise work before the sweeps leaves for that behind them.
template <int P>
struct Elementwise {
  float2 u[Map<P>::kPasses], dp[Map<P>::kPasses];
  float2 gate_slope[Map<P>::kPasses];  // dz = gate_slope p
};

// dp = dy silu(z); returns dy silu'(z).
__device__ __forceinline__ float gate(float dy, float z, float& dp) {
  const float s = sigmoid(z);
  dp = dy * (z * s);
  return dy * (s * (1.0f + z * (1.0f - s)));
}

// Steps beyond the sequence have dp = 0: rows are clamped, and dy there is that of another step.
template <class Real, int P>
__device__ __forceinline__ void stage(BackwardTile<P>& shared, Elementwise<P>& own,
                                      const RawElements<Real, P>& raw, const Place<P>& place,
                                      bool gated, float2 bias, int steps) {
#pragma unroll
  for (int j = 0; j < Map<P>::kPasses; ++j) {
    const int t = place.row + j * Map<P>::kRows;
    const float2 u = raw.u.at[j].get(), dy = raw.dy.at[j].get();
    const float2 delta = deltas_of(raw.dt.at[j].get(), bias, place, t < steps);
    float2 dp = dy;
    own.gate_slope[j] = make_float2(0, 0);
    if (gated) {
      const float2 z = raw.z.at[j].get();
      own.gate_slope[j].x = gate(dy.x, z.x, dp.x);
      own.gate_slope[j].y = gate(dy.y, z.y, dp.y);
    }
    const int channels = t < steps ? place.channels : 0;
    dp = make_float2(channels > 0 ? dp.x : 0.0f, channels > 1 ? dp.y : 0.0f);
    own.u[j] = u, own.dp[j] = dp;
    if (t >= kTile) continue;
    shared.deltas[t][place.column] = make_float4(delta.x, delta.y, delta.x * u.x, delta.y * u.y);
    shared.dp[t][place.column] = dp;
  }
  raw.cells.stage(&shared.cells[0][0][0]);
}

// Keeps the states before each step of the tile, from those before its first; h is the last then.
// Where a document starts, what is kept is the state that the step before ended with.
template <bool kStarts, int P>
__device__ __forceinline__ void sweep_forward(BackwardTile<P>& shared, States<>& h,
                                              const States<>& rates, const Place<P>& place,
                                              int steps, unsigned starts) {
  static_assert(kTile % 2 == 0);
#pragma unroll 1
  for (int t = 0; t < steps; t += 2) {  // both steps' reads before the stores; delta = 0 beyond
    const float4 delta[2] = {shared.deltas[t][place.pair], shared.deltas[t + 1][place.pair]};
    const float4 b[2] = {shared.cell(t, 0, place.p), shared.cell(t + 1, 0, place.p)};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float deltas[2] = {delta[k].x, delta[k].y}, inputs[2] = {delta[k].z, delta[k].w};
      const float bs[4] = {b[k].x, b[k].y, b[k].z, b[k].w};
#pragma unroll
      for (int ch = 0; ch < 2; ++ch) shared.kept[t + k][ch][threadIdx.x] = h.get(ch);
      if (kStarts && (starts >> (t + k) & 1)) h.fill(0);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int ch = i / 4, n = i % 4;
        const float a = exp2_of(deltas[ch] * rates.at[ch][n]);
        h.at[ch][n] = fmaf(a, h.at[ch][n], inputs[ch] * bs[n]);
      }
    }
  }
}

// One step back in time. h: the state after the step, then before it. carry: a g of the step
// behind, then of this one. da: sum of delta a h g. kStart: a document starts with the step, whose
// a is 0.
template <bool kStart, int P>
__device__ __forceinline__ void step_back(BackwardTile<P>& shared, int t, States<>& h,
                                          States<>& carry, States<>& da, const States<>& rates,
                                          const Place<P>& place) {
  const float4 delta = shared.deltas[t][place.pair];
  const float2 dp = shared.dp[t][place.pair];
  const float4 b = shared.cell(t, 0, place.p), c = shared.cell(t, 1, place.p);
  const float deltas[2] = {delta.x, delta.y}, inputs[2] = {delta.z, delta.w};
  const float dps[2] = {dp.x, dp.y};
  const float bs[4] = {b.x, b.y, b.z, b.w}, cs[4] = {c.x, c.y, c.z, c.w};
  States<> before;
#pragma unroll
  for (int ch = 0; ch < 2; ++ch) before.set(ch, shared.kept[t][ch][threadIdx.x]);
  float db[4] = {0, 0, 0, 0}, dc[4] = {0, 0, 0, 0};
  float g_b[2] = {0, 0}, c_h[2] = {0, 0}, rate_r[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int ch = i / 4, n = i % 4;
    const float g = fmaf(cs[n], dps[ch], carry.at[ch][n]);
    c_h[ch] = fmaf(cs[n], h.at[ch][n], c_h[ch]);
    dc[n] = fmaf(dps[ch], h.at[ch][n], dc[n]);
    db[n] = fmaf(inputs[ch], g, db[n]);
    g_b[ch] = fmaf(g, bs[n], g_b[ch]);
    carry.at[ch][n] = kStart ? 0.0f : exp2_of(deltas[ch] * rates.at[ch][n]) * g;
    const float r = carry.at[ch][n] * before.at[ch][n];
    rate_r[ch] = fmaf(rates.at[ch][n], r, rate_r[ch]);
    da.at[ch][n] = fmaf(deltas[ch], r, da.at[ch][n]);
    h.at[ch][n] = before.at[ch][n];
  }
  shared.kept[t][0][threadIdx.x] = make_float4(db[0], db[1], db[2], db[3]);
  shared.kept[t][1][threadIdx.x] = make_float4(dc[0], dc[1], dc[2], dc[3]);
  const float sum_b = sum_states<P>(g_b[0], g_b[1], place.p);
  const float sum_c = sum_states<P>(c_h[0], c_h[1], place.p);
  const float sum_r = sum_states<P>(rate_r[0], rate_r[1], place.p);
  __syncwarp();  // the pair's threads have read what is overwritten now
  if (place.p < 2) {
    const int channel = 2 * place.pair + place.p;
    *shared.input(t, channel) = sum_b;
    *shared.slope(t, channel) = sum_c;
    *shared.rate(t, channel) = sum_r;
  }
}

// db and dc of the block's channels: the threads' sums in a fixed order, four states a thread. Of
// each two neighbouring pairs every other group of P threads reads the second one first: with P = 4
// a quarter of a warp then hits each bank once.
template <int P>
__device__ __forceinline__ void sum_channels(const BackwardTile<P>& shared, float4* to, int steps) {
  constexpr int kPairs = Map<P>::kPairs;
  static_assert(kPairs % 2 == 0);
  for (int item = int(threadIdx.x); item < steps * 2 * P; item += kThreads) {
    const int odd = item / P % 2;
    const float4* from = &shared.kept[item / (2 * P)][odd][item % P];
    const float4 *first = from + odd * P, *second = from + (1 - odd) * P;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
    for (int k = 0; k < kPairs; k += 2) {
      const float4 x = first[k * P], y = second[k * P];
      sum.x += x.x + y.x, sum.y += x.y + y.y, sum.z += x.z + y.z, sum.w += x.w + y.w;
    }
    to[item] = sum;
  }
}

// softplus'(x) = 1 - exp(-softplus(x)), without cancellation: a series where delta is small.
__device__ __forceinline__ float softplus_slope(float delta) {
  float p = fmaf(delta, -1.0f / 720, 1.0f / 120);
  p = fmaf(p, delta, -1.0f / 24);
  p = fmaf(p, delta, 1.0f / 6);
  p = fmaf(p, delta, -0.5f);
  p = fmaf(p, delta, 1.0f);
  return delta < 0.25f ? p * delta : 1.0f - exp2_of(-kLog2e * delta);
}

// du, ddt, dz of a tile; adds to the pair's dskip and ddt_bias.
template <class Real, int P>
__device__ __forceinline__ void write_elements(const BackwardCall<Real>& call,
                                               const BackwardTile<P>& shared,
                                               const Elementwise<P>& own, const Place<P>& place,
                                               const Span& span, float2& dskip,
                                               float2& ddt_bias) {
  const bool in_pairs = call.in.in_pairs;
  const float2 skip = load_pair(call.in.skip, place);  // here, where registers are free
#pragma unroll
  for (int j = 0; j < Map<P>::kPasses; ++j) {
    const int t = place.row + j * Map<P>::kRows;
    if (t >= span.steps) break;
    const float4 sums = shared.deltas[t][place.column];  // delta, then sum_n g b
    const float2 rate = shared.rates[t][place.column], slope = shared.dp[t][place.column];
    const float2 u = own.u[j], dp = own.dp[j];
    const float2 ddt =
        make_float2(fmaf(u.x, sums.z, kLn2 * rate.x) * softplus_slope(sums.x),
                    fmaf(u.y, sums.w, kLn2 * rate.y) * softplus_slope(sums.y));
    const float2 du =
        make_float2(fmaf(skip.x, dp.x, sums.x * sums.z), fmaf(skip.y, dp.y, sums.y * sums.w));
    const int64_t token = span.token + t;
    put_pair(call.du.row(token) + place.d, du, place.channels, in_pairs);
    put_pair(call.ddt.row(token) + place.d, ddt, place.channels, in_pairs);
    if (call.dz.at) {
      const float2 dz = make_float2(own.gate_slope[j].x * fmaf(skip.x, u.x, slope.x),
                                    own.gate_slope[j].y * fmaf(skip.y, u.y, slope.y));
      put_pair(call.dz.row(token) + place.d, dz, place.channels, in_pairs);
    }
    dskip.x = fmaf(dp.x, u.x, dskip.x), dskip.y = fmaf(dp.y, u.y, dskip.y);
    ddt_bias.x += ddt.x, ddt_bias.y += ddt.y;
  }
}

// What a block adds to the gradients of the parameters.
template <int P>
__device__ __forceinline__ void write_sums(BackwardTile<P>& shared, float* to, const States<>& da,
                                           const States<>& rates, float2 dskip, float2 ddt_bias) {
  constexpr int kChannels = Map<P>::kChannels;
  float2* const own = reinterpret_cast<float2*>(&shared.kept[0][0][0]);  // [2][kRows][kPairs]
#pragma unroll
  for (int i = 0; i < 8; ++i)
    to[i / 4 * 512 + int(threadIdx.x) * 4 + i % 4] =
        da.at[i / 4][i % 4] * rates.at[i / 4][i % 4] * kLn2;
  __syncthreads();  // whoever sums the channels of the last tile is done
  own[threadIdx.x] = dskip;
  own[kThreads + threadIdx.x] = ddt_bias;
  __syncthreads();
  const float* const parts = &own[0].x;
  for (int i = int(threadIdx.x); i < 2 * kChannels; i += kThreads) {
    float sum = 0;
#pragma unroll
    for (int row = 0; row < Map<P>::kRows; ++row)
      sum += parts[(i / kChannels * Map<P>::kRows + row) * kChannels + i % kChannels];
    to[1024 + i] = sum;
  }
}

// Walks over a block's part of time from its end: sweeps forward over a tile from the state that
// forward kept, leaving the states in shared memory, then back. Reads u, dt, z, dy, b, c and the
// states once, writes du, ddt, dz, and db and dc of its channels. Per (t, d, n) two exp2 and about
// 26 issue slots, element-wise work included: bound by issue. Barriers: two a tile.
template <class Real, int P>
__global__ void __launch_bounds__(kThreads, P == 2 ? 2 : 3)
    backward(const __grid_constant__ BackwardCall<Real> call) {
  extern __shared__ float4 memory[];
  auto& shared = *reinterpret_cast<BackwardTile<P>*>(memory);
  const Sizes& s = call.in.s;
  const Place<P> place(s, s.blocks);
  const States<> rates = load_rates(call.in.a_log, s, place);
  const bool gated = call.in.z.at != nullptr;
  const float2 bias = load_pair(call.in.dt_bias, place);
  const int64_t part = place.sequence * s.splits + place.split;
  States<> carry, da;
  da.fill(0);
  if (call.entering) carry.load(call.entering, part, s, place);
  else carry.load(call.dfinal, s, place);
  float2 dskip = make_float2(0, 0), ddt_bias = dskip;
  RawElements<Real, P> raw;
  if (place.first_tile < place.last_tile) raw.load(call, place, place.last_tile - 1);
  for (int tile = place.last_tile - 1; tile >= place.first_tile; --tile) {
    States<> h;
    h.load(call.states, place.sequence * s.tiles + tile, s, place);
    Elementwise<P> own;
    const Span span = place.span(s, tile);
    const int steps = span.steps;
    stage(shared, own, raw, place, gated, bias, steps);
    const unsigned starts = starts_of(call.in.starts, span);
    __syncthreads();  // the tile is there, and the last one's sums over channels are taken
    if (starts == 0) sweep_forward<false>(shared, h, rates, place, steps, 0);
    else sweep_forward<true>(shared, h, rates, place, steps, starts);
    if (tile > place.first_tile) raw.load(call, place, tile - 1);
#pragma unroll 1
    for (int t = steps - 1; t >= 0; --t) {
      if (starts >> t & 1)
        step_back<true>(shared, t, h, carry, da, rates, place);
      else
        step_back<false>(shared, t, h, carry, da, rates, place);
    }
    __syncthreads();  // the sums are there
    sum_channels(shared, call.cell_parts + (place.block * s.B * s.L + span.token) * 2 * P, steps);
    write_elements(call, shared, own, place, span, dskip, ddt_bias);
  }
  if (call.dinitial.at && place.split == 0) carry.store(call.dinitial, s, place);
  write_sums(shared, call.sums + int64_t(blockIdx.x) * Map<P>::kSums, da, rates, dskip, ddt_bias);
}

// What a part of time does to the gradient of the state that comes from behind it: from zeros it
// ends, at the part's begin, at `ends`; what enters is multiplied by `decays`. Costs about what the
// forward pass does.
template <class Real, int P>
__global__ void __launch_bounds__(kThreads, 2)
    find_ends(const __grid_constant__ BackwardCall<Real> call) {
  extern __shared__ float4 memory[];
  auto& shared = *reinterpret_cast<BackwardTile<P>*>(memory);
  const Sizes& s = call.in.s;
  const Place<P> place(s, s.blocks);
  const States<> rates = load_rates(call.in.a_log, s, place);
  const bool gated = call.in.z.at != nullptr;
  const float2 bias = load_pair(call.in.dt_bias, place);
  States<> carry, decays;
  carry.fill(0);
  float time[2] = {0, 0};  // the sum of delta
  bool cut = false;        // a document starts in this part: nothing gets through
  RawElements<Real, P> raw;
  for (int tile = place.last_tile - 1; tile >= place.first_tile; --tile) {
    Elementwise<P> own;
    raw.load(call, place, tile);
    const Span span = place.span(s, tile);
    stage(shared, own, raw, place, gated, bias, span.steps);
    const unsigned starts = starts_of(call.in.starts, span);
    cut |= starts != 0;
    __syncthreads();
    for (int t = span.steps - 1; t >= 0; --t) {
      const float4 delta = shared.deltas[t][place.pair], c = shared.cell(t, 1, place.p);
      const float2 dp = shared.dp[t][place.pair];
      const float deltas[2] = {delta.x, delta.y}, dps[2] = {dp.x, dp.y};
      const float cs[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
      for (int i = 0; i < 8; ++i)
        carry.at[i / 4][i % 4] = exp2_of(deltas[i / 4] * rates.at[i / 4][i % 4]) *
                                 fmaf(cs[i % 4], dps[i / 4], carry.at[i / 4][i % 4]);
      time[0] += deltas[0];
      time[1] += deltas[1];
      if (starts >> t & 1) carry.fill(0);
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    decays.at[i / 4][i % 4] = cut ? 0.0f : exp2_of(time[i / 4] * rates.at[i / 4][i % 4]);
  const int64_t part = place.sequence * s.splits + place.split;
  carry.store(call.ends, part, s, place);
  decays.store(call.decays, part, s, place);
}

// db and dc: the sums over the blocks of channels, in their order. Bound by HBM.
template <class Real>
__global__ void sum_blocks(const float* parts, int blocks, int64_t T, int states, int N,
                           Strided<Real> db, Strided<Real> dc) {
  const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x, count = T * 2 * states;
  const int n = int(i % states);
  if (i >= count || n >= N) return;
  float sum = 0;
#pragma unroll 8
  for (int block = 0; block < blocks; ++block) sum += parts[block * count + i];
  const int64_t t = i / (2 * states);
  Real* const to = i / states % 2 == 0 ? db.row(t) : dc.row(t);
  to[n] = from_float<Real>(sum);
}

// Where a column of the blocks' sums goes.
struct ParameterGradients {
  int D, N, P;
  Strided<float> da_log;
  float *ddt_bias, *dskip;
  bool accumulate;

  __device__ void operator()(int64_t col, float sum) const {
    const int channels = 256 / P, all = 1024 + 2 * channels, i = int(col % all);
    const int64_t first = col / all * channels;
    const int thread = i % 512 / 4, n = 4 * (thread % P) + i % 4;
    const int64_t d = first + (i < 1024 ? 2 * (thread / P) + i / 512 : (i - 1024) % channels);
    if (d >= D || (i < 1024 && n >= N)) return;
    float* to = i < 1024              ? da_log.row(d) + n
                : i < 1024 + channels ? dskip + d
                                      : ddt_bias + d;
    *to = accumulate ? *to + sum : sum;
  }
};

struct BackwardMemory {
  float *cell_parts, *sums, *ends, *decays;  // the last two only where time is split
  BackwardMemory(Cutter& cutter, const Sizes& s) {
    const int64_t parts = s.splits > 1 ? s.grid() * 1024 : 0;
    cell_parts = cutter.floats(s.blocks * s.B * s.L * 8 * s.P);
    sums = cutter.floats(s.grid() * (1024 + 512 / s.P));
    ends = cutter.floats(parts);
    decays = cutter.floats(parts);
  }
};

template <class Real, int P>
void launch(Stream& stream, const ScanBackward& op, const Sizes& s, const BackwardMemory& memory) {
  const bool split = s.splits > 1;
  check_strides({op.u, op.dt, op.b, op.c, op.z, op.dy});
  const bool pairs =
      lie_on_pairs({op.u, op.dt, op.z, op.dy, op.du, op.ddt, op.z ? op.dz : Tensor()});
  BackwardCall<Real> call{.in = {s, op, pairs},
                          .dy = Strided<Real>(op.dy),
                          .du = Strided<Real>(op.du),
                          .ddt = Strided<Real>(op.ddt),
                          .dz = Strided<Real>(op.z ? op.dz : Tensor()),
                          .dfinal = Strided<float>(op.dfinal),
                          .dinitial = Strided<float>(op.dinitial),
                          .states = pointer<const float4>(op.states),
                          .entering = reinterpret_cast<float4*>(split ? memory.ends : nullptr),
                          .ends = reinterpret_cast<float4*>(memory.ends),
                          .decays = reinterpret_cast<float4*>(memory.decays),
                          .cell_parts = reinterpret_cast<float4*>(memory.cell_parts),
                          .sums = memory.sums};
  constexpr size_t bytes = sizeof(BackwardTile<P>);
  const unsigned grid = grid_of(s.grid());
  const cudaStream_t on = native(stream);
  const auto allow = [&](auto* kernel) {
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    int(bytes)), op.name);
  };
  if (split) {
    allow(find_ends<Real, P>);
    find_ends<Real, P><<<grid, kThreads, bytes, on>>>(call);
    carry_over_parts<P><<<grid_of(s.units() * 1024 / kThreads), kThreads, 0, on>>>(
        s, memory.ends, memory.decays, call.dfinal, true);
  }
  allow(backward<Real, P>);
  backward<Real, P><<<grid, kThreads, bytes, on>>>(call);
  const int64_t T = s.B * s.L, cells = T * 8 * P;
  if (T > 0)
    sum_blocks<Real><<<grid_of(ceil_divide(cells, 256)), 256, 0, on>>>(
        memory.cell_parts, s.blocks, T, 4 * P, s.N, Strided<Real>(op.db), Strided<Real>(op.dc));
}

}  // namespace
}  // namespace scan

void run_cuda(Stream& stream, const ScanBackward& op) {
  const scan::Sizes s =
      scan::sizes_of(op.sequences, op.u.rows(), op.u.cols(), op.a_log.cols(),
                     scan::kBackwardBlocks);
  scan::Cutter count;
  scan::BackwardMemory(count, s);
  scan::Cutter cutter(stream.workspace(count.bytes()));
  const scan::BackwardMemory memory(cutter, s);
  if (s.grid() > 0)
    scan::visit(op.u.dtype, s.P, [&]<class Real, int P>() {
      scan::launch<Real, P>(stream, op, s, memory);
    });
  const scan::ParameterGradients finish{.D = s.D,
                                        .N = s.N,
                                        .P = s.P,
                                        .da_log = Strided<float>(op.da_log),
                                        .ddt_bias = pointer<float>(op.ddt_bias),
                                        .dskip = pointer<float>(op.dskip),
                                        .accumulate = op.accumulate};
  launch_sum_rows(stream, memory.sums, s.B * s.splits, s.blocks * (1024 + 512 / s.P), finish);
  cuda_check(cudaGetLastError(), op.name);
}

}  // namespace moemamba
