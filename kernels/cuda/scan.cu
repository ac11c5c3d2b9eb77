#include "kernels/cuda/scan_tiles.cuh"

namespace moemamba {

namespace scan {
namespace {

template <class Real>
struct ForwardCall {
  Inputs<Real> in;
  int blocks;  // of channels
  Strided<Real> y;
  Strided<float> final;
  float4* states;          // [B, tiles] items, before each tile; or null
  const float4* entering;  // [B, splits] items; null: every part begins with `initial`
  float4 *ends, *decays;   // likewise, for the pass that finds them
};

template <int P, int H>
struct ForwardTile {
  using M = Map<P, H>;
  float4 deltas[kTile][M::kPairs];  // delta of both channels, delta u of both
  float cells[kTile][2][M::kStates];
  // What each of a pair's threads has of sum_n c h, of both channels. The threads' parts lie apart
  // so that half a warp's stores hit each bank once.
  float2 sums[kTile][P][M::kPairs + (P > 1 ? 16 / P : 0)];

  // H values of b (which = 0) or c.
  __device__ void cell(int t, int which, int p, float (&to)[H]) const {
    const float* from = &cells[t][which][H * p];
    if constexpr (H == 2) {
      const float2 v = *reinterpret_cast<const float2*>(from);
      to[0] = v.x, to[1] = v.y;
    } else {
#pragma unroll
      for (int n = 0; n < H; n += 4) {
        const float4 v = *reinterpret_cast<const float4*>(from + n);
        to[n] = v.x, to[n + 1] = v.y, to[n + 2] = v.z, to[n + 3] = v.w;
      }
    }
  }
};

// One step of the thread's states.
template <int H>
__device__ __forceinline__ void advance(States<H>& h, const States<H>& rates, float4 delta,
                                        const float (&b)[H]) {
  const float deltas[2] = {delta.x, delta.y}, inputs[2] = {delta.z, delta.w};
#pragma unroll
  for (int i = 0; i < 2 * H; ++i) {
    const int ch = i / H, n = i % H;
    const float a = exp2_of(deltas[ch] * rates.at[ch][n]);
    h.at[ch][n] = fmaf(a, h.at[ch][n], inputs[ch] * b[n]);
  }
}

// kSteps steps from t on; their sums are stored behind the last one's reads, so that nothing keeps
// the reads from being hoisted. Steps beyond the sequence have delta = 0 and change nothing.
template <int kSteps, bool kStarts, int P, int H>
__device__ __forceinline__ void forward_steps(ForwardTile<P, H>& tile, int t, unsigned starts,
                                              States<H>& h, const States<H>& rates,
                                              const Place<P, H>& place) {
  float2 y[kSteps];
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    float b[H], c[H];
    tile.cell(t + k, 0, place.p, b);
    tile.cell(t + k, 1, place.p, c);
    if (kStarts && (starts >> (t + k) & 1)) h.fill(0);
    advance(h, rates, tile.deltas[t + k][place.pair], b);
    y[k] = make_float2(0, 0);
#pragma unroll
    for (int n = 0; n < H; ++n) {
      y[k].x = fmaf(c[n], h.at[0][n], y[k].x);
      y[k].y = fmaf(c[n], h.at[1][n], y[k].y);
    }
  }
#pragma unroll
  for (int k = 0; k < kSteps; ++k) tile.sums[t + k][place.p][place.pair] = y[k];
}

template <class Real, int P, int H>
__device__ __forceinline__ void stage(ForwardTile<P, H>& tile, const Elements<Real, P, H>& u,
                                      const Elements<Real, P, H>& dt, float2 bias,
                                      const Place<P, H>& place, int steps) {
#pragma unroll
  for (int j = 0; j < Map<P, H>::kPasses; ++j) {
    const int t = place.row + j * Map<P, H>::kRows;
    const float2 value = u.at[j].get(), x = dt.at[j].get();
    const float2 delta = deltas_of(x, bias, place, t < steps);
    if (t < kTile)
      tile.deltas[t][place.column] =
          make_float4(delta.x, delta.y, delta.x * value.x, delta.y * value.y);
  }
}

template <class Real, int P, int H>
__device__ __forceinline__ void write_y(const ForwardCall<Real>& call,
                                        const ForwardTile<P, H>& tile,
                                        const Elements<Real, P, H>& u,
                                        const Elements<Real, P, H>& z, const Place<P, H>& place,
                                        const Span& span) {
  const float2 skip = load_pair(call.in.skip, place);  // here, where registers are free
  Real* const first = call.y.row(span.token) + place.d;
  const int stride = int(call.y.stride);
#pragma unroll
  for (int j = 0; j < Map<P, H>::kPasses; ++j) {
    const int t = place.row + j * Map<P, H>::kRows;
    const float2 value = u.at[j].get();
    float2 y = make_float2(skip.x * value.x, skip.y * value.y);
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const float2 part = tile.sums[min(t, kTile - 1)][p][place.column];
      y.x += part.x, y.y += part.y;
    }
    if (call.in.z.at) {
      const float2 x = z.at[j].get();
      y.x *= x.x * sigmoid(x.x), y.y *= x.y * sigmoid(x.y);
    }
    const int channels = t < span.steps ? place.channels : 0;
    put_pair(first + int64_t(t) * stride, y, channels, call.in.in_pairs);
  }
}

// Runs over a block's part of time. Reads u, dt, z once, b and c once per block of channels (from
// L2 mostly), writes y and, every kTile steps, the states. Per (t, d, n) one exp2 and about 8 issue
// slots, of which the element-wise work takes 2 to 3: bound by issue, then by the exp2 unit.
template <class Real, int P, int H, int kSteps, int kMinBlocks>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    forward(const __grid_constant__ ForwardCall<Real> call) {
  static_assert(kTile % kSteps == 0);
  extern __shared__ float4 memory[];
  auto& shared = *reinterpret_cast<ForwardTile<P, H>*>(memory);
  const Inputs<Real>& in = call.in;
  const Sizes& s = in.s;
  const Place<P, H> place(s, call.blocks);
  const States<H> rates = load_rates(in.a_log, s, place);
  States<H> h;
  if (call.entering) h.load(call.entering, place.sequence * s.splits + place.split, s, place);
  else h.load(in.initial, s, place);
  const float2 bias = load_pair(in.dt_bias, place);

  Elements<Real, P, H> u, dt;
  Cells<Real, Map<P, H>::kStates> cells;
  const auto load = [&](int tile) {
    const Span span = place.span(s, tile);
    u.load(in.u, place, span, in.in_pairs);
    dt.load(in.dt, place, span, in.in_pairs);
    cells.load(in.b, in.c, s.N, span);
  };
  if (place.first_tile < place.last_tile) load(place.first_tile);
  for (int tile = place.first_tile; tile < place.last_tile; ++tile) {
    const Span span = place.span(s, tile);
    stage(shared, u, dt, bias, place, span.steps);
    cells.stage(&shared.cells[0][0][0]);
    const unsigned starts = starts_of(in.starts, span);
    __syncthreads();  // the tile is there, and the last one's sums are taken
    Elements<Real, P, H> z;
    const Elements<Real, P, H> values = u;
    if (in.z.at) z.load(in.z, place, span, in.in_pairs);
    if (tile + 1 < place.last_tile) load(tile + 1);
    if (call.states) h.store(call.states, place.sequence * s.tiles + tile, s, place);
    if (starts == 0) {
#pragma unroll 1
      for (int t = 0; t < span.steps; t += kSteps)
        forward_steps<kSteps, false>(shared, t, 0, h, rates, place);
    } else {
#pragma unroll 1
      for (int t = 0; t < span.steps; ++t)
        forward_steps<1, true>(shared, t, starts, h, rates, place);
    }
    __syncthreads();  // the sums are there, and the tile may be overwritten
    write_y(call, shared, values, z, place, span);
  }
  if (call.final.at && place.split == s.splits - 1) h.store(call.final, s, place);
}

// What a part of time does to the states: from zeros it ends at `ends`, and what enters it is
// multiplied by `decays`. Most of the forward pass; bound by issue and the exp2 unit.
template <class Real, int P>
__global__ void __launch_bounds__(kThreads, P == 2 ? 2 : 4)
    find_ends(const __grid_constant__ ForwardCall<Real> call) {
  extern __shared__ float4 memory[];
  auto& shared = *reinterpret_cast<ForwardTile<P, 4>*>(memory);
  const Inputs<Real>& in = call.in;
  const Sizes& s = in.s;
  const Place<P> place(s, s.blocks);
  const States<> rates = load_rates(in.a_log, s, place);
  const float2 bias = load_pair(in.dt_bias, place);
  States<> h;
  h.fill(0);
  float time[2] = {0, 0};  // the sum of delta
  bool cut = false;        // a document starts in this part: nothing gets through
  Elements<Real, P> u, dt;
  Cells<Real, Map<P>::kStates> cells;
  const auto load = [&](int tile) {
    const Span span = place.span(s, tile);
    u.load(in.u, place, span, in.in_pairs);
    dt.load(in.dt, place, span, in.in_pairs);
    cells.load(in.b, in.c, s.N, span);
  };
  if (place.first_tile < place.last_tile) load(place.first_tile);
  for (int tile = place.first_tile; tile < place.last_tile; ++tile) {
    const Span span = place.span(s, tile);
    stage(shared, u, dt, bias, place, span.steps);
    cells.stage(&shared.cells[0][0][0]);
    const unsigned starts = starts_of(in.starts, span);
    cut |= starts != 0;
    __syncthreads();
    if (tile + 1 < place.last_tile) load(tile + 1);
#pragma unroll 2
    for (int t = 0; t < span.steps; ++t) {
      if (starts >> t & 1) h.fill(0);
      const float4 delta = shared.deltas[t][place.pair];
      float b[4];
      shared.cell(t, 0, place.p, b);
      time[0] += delta.x;
      time[1] += delta.y;
      advance(h, rates, delta, b);
    }
    __syncthreads();
  }
  States<> decays;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    decays.at[i / 4][i % 4] = cut ? 0.0f : exp2_of(time[i / 4] * rates.at[i / 4][i % 4]);
  const int64_t item = place.sequence * s.splits + place.split;
  h.store(call.ends, item, s, place);
  decays.store(call.decays, item, s, place);
}

template <class Call>
void launch_on(Stream& stream, void (*kernel)(Call), const Call& call, int64_t blocks,
               size_t shared_bytes) {
  if (shared_bytes > 48 * 1024)
    cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    int(shared_bytes)), ScanForward::name);
  kernel<<<grid_of(blocks), kThreads, shared_bytes, native(stream)>>>(call);
}

// A thread holds four states of two channels. Seven steps between two stores of their sums suit the
// N of all models (docs/benchmarks.md has the other cuts that were measured); with fewer or more
// states, shorter runs leave more registers.
template <class Real, int P, int kSteps, int kMinBlocks>
void launch(Stream& stream, ForwardCall<Real> call) {
  constexpr int kStates = 4;
  const Sizes& s = call.in.s;
  call.blocks = int(ceil_divide(s.D, Map<P, kStates>::kChannels));
  launch_on(stream, forward<Real, P, kStates, kSteps, kMinBlocks>, call,
            s.B * s.splits * call.blocks, sizeof(ForwardTile<P, kStates>));
}

// The whole operator.
template <class Real, int P>
void run_forward(Stream& stream, const ScanForward& op, const Sizes& s) {
  check_strides({op.u, op.dt, op.b, op.c, op.z, op.y});
  const int64_t parts = s.splits > 1 ? s.grid() * 1024 : 0;
  float* const ends =
      parts ? reinterpret_cast<float*>(stream.workspace(size_t(parts) * 8)) : nullptr;
  float* const decays = ends + parts;
  ForwardCall<Real> call{.in = {s, op, lie_on_pairs({op.u, op.dt, op.z, op.y})},
                         .blocks = s.blocks,
                         .y = Strided<Real>(op.y),
                         .final = Strided<float>(op.final),
                         .states = pointer<float4>(op.states),
                         .entering = reinterpret_cast<const float4*>(ends),
                         .ends = reinterpret_cast<float4*>(ends),
                         .decays = reinterpret_cast<float4*>(decays)};
  if (ends) {
    launch_on(stream, find_ends<Real, P>, call, s.grid(), sizeof(ForwardTile<P, 4>));
    carry_over_parts<P>
        <<<grid_of(s.units() * 1024 / kThreads), kThreads, 0, native(stream)>>>(
            s, ends, decays, call.in.initial, false);
  }
  launch<Real, P, P == 4 ? 7 : 2, P == 2 ? 3 : 4>(stream, call);
  cuda_check(cudaGetLastError(), op.name);
}

}  // namespace

}  // namespace scan

void run_cuda(Stream& stream, const ScanForward& op) {
  const scan::Sizes s = scan::sizes_of(op.sequences, op.u.rows(), op.u.cols(), op.a_log.cols(),
                                       scan::kForwardBlocks);
  if (s.grid() == 0) return;
  scan::visit(op.u.dtype, s.P,
              [&]<class Real, int P>() { scan::run_forward<Real, P>(stream, op, s); });
}

}  // namespace moemamba
