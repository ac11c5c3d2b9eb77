#include "kernels/cuda/scan_tiles.cuh"

namespace moemamba {

namespace scan {
namespace {

template <class Real>
struct ForwardCall {
  Inputs<Real> in;
  Rows<Real> y;
  Rows<float> final;
  float4* states;         // [B, tiles, blocks][1024], before each tile; or null
  const float4* entering;  // [B, splits, blocks][1024]; null: every part begins with `initial`
  float4 *ends, *decays;  // likewise, for the pass that finds them
};

template <int P>
struct ForwardTile {
  float4 deltas[kTile][Map<P>::kPairs];  // delta of both channels, delta u of both
  float cells[kTile][2][Map<P>::kStates];
  float sums[kTile][Map<P>::kChannels];  // sum_n c h

  __device__ void put(int t, int channel, float delta, float u) {
    float* pair = reinterpret_cast<float*>(&deltas[t][channel / 2]) + channel % 2;
    pair[0] = delta;
    pair[2] = delta * u;
  }
  __device__ float4 cell(int t, int which, int p) const {
    return *reinterpret_cast<const float4*>(&cells[t][which][4 * p]);
  }
};

// One step of the thread's eight states.
__device__ __forceinline__ void advance(States& h, const States& rates, float4 delta, float4 b) {
  const float deltas[2] = {delta.x, delta.y}, inputs[2] = {delta.z, delta.w};
  const float bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int ch = i / 4, n = i % 4;
    const float a = exp2_of(deltas[ch] * rates.at[ch][n]);
    h.at[ch][n] = fmaf(a, h.at[ch][n], inputs[ch] * bs[n]);
  }
}

template <int P>
__device__ __forceinline__ void forward_step(ForwardTile<P>& tile, int t, States& h,
                                             const States& rates, const Place<P>& place) {
  advance(h, rates, tile.deltas[t][place.pair], tile.cell(t, 0, place.p));
  const float4 c = tile.cell(t, 1, place.p);
  const float cs[4] = {c.x, c.y, c.z, c.w};
  float y[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 8; ++i) y[i / 4] = fmaf(cs[i % 4], h.at[i / 4][i % 4], y[i / 4]);
  const float sum = sum_states<P>(y[0], y[1], place.p);
  if (place.p < 2) tile.sums[t][2 * place.pair + place.p] = sum;
}

// Runs over a block's part of time. Reads u, dt, z once, b and c once per block of channels (from
// L2 mostly), writes y and, every kTile steps, the states. Per (t, d, n) one exp2 and about 7 issue
// slots, 10 with the element-wise work: bound by the exp2 unit and issue alike.
template <class Real, int P>
__global__ void __launch_bounds__(kThreads, P == 2 ? 2 : 4)
    forward(const __grid_constant__ ForwardCall<Real> call) {
  using M = Map<P>;
  __shared__ ForwardTile<P> shared;
  const Inputs<Real>& in = call.in;
  const Sizes& s = in.s;
  const Place<P> place(s);
  const States rates = load_rates(in.a_log, s, place);
  States h;
  if (call.entering) h.load(call.entering, blockIdx.x, place);
  else h.load(in.initial, s, place);
  const bool there = place.d < s.D, gated = in.z.at != nullptr;
  const float bias = there ? in.dt_bias[place.d] : 0.0f, skip = there ? in.skip[place.d] : 0.0f;

  Elements<Real, P> u, dt, z;
  Cells<Real, P> cells;
  const auto load = [&](int tile) {
    u.load(in.u, s, place, tile);
    dt.load(in.dt, s, place, tile);
    if (gated) z.load(in.z, s, place, tile);
    cells.load(in.b, in.c, s, place, tile);
  };
  if (place.first_tile < place.last_tile) load(place.first_tile);
  for (int tile = place.first_tile; tile < place.last_tile; ++tile) {
    float direct[M::kElements], gate[M::kElements];
#pragma unroll
    for (int j = 0; j < M::kElements; ++j) {
      const int t = place.row + j * M::kRows;
      const float value = to_float(u.at[j]), x = gated ? to_float(z.at[j]) : 0.0f;
      direct[j] = skip * value;
      gate[j] = gated ? x * sigmoid(x) : 1.0f;
      if (t < kTile)
        shared.put(t, place.channel, there ? softplus(to_float(dt.at[j]) + bias) : 0.0f, value);
    }
    cells.stage(&shared.cells[0][0][0]);
    const unsigned starts = starts_of(in.starts, s, place, tile);
    const int steps = place.steps(s, tile);
    __syncthreads();  // the tile is there
    if (tile + 1 < place.last_tile) load(tile + 1);
    if (call.states)
      h.store(call.states, (place.sequence * s.tiles + tile) * s.blocks + place.block, place);
    if (starts == 0) {
#pragma unroll 2
      for (int t = 0; t < steps; ++t) forward_step(shared, t, h, rates, place);
    } else {
      for (int t = 0; t < steps; ++t) {
        if (starts >> t & 1) h.fill(0);
        forward_step(shared, t, h, rates, place);
      }
    }
    __syncthreads();  // the sums are there, and the tile may be overwritten
    const int64_t token = place.token(s, tile);
#pragma unroll
    for (int j = 0; j < M::kElements; ++j) {
      const int t = place.row + j * M::kRows;
      if (t >= steps || !there) continue;
      const float p = shared.sums[t][place.channel] + direct[j];
      call.y.row(token + t)[place.d] = from_float<Real>(p * gate[j]);
    }
  }
  if (call.final.at && place.split == s.splits - 1) h.store(call.final, s, place);
}

// What a part of time does to the states: from zeros it ends at `ends`, and what enters it is
// multiplied by `decays`. Half of the forward pass; bound by the exp2 unit.
template <class Real, int P>
__global__ void __launch_bounds__(kThreads, P == 2 ? 2 : 4)
    find_ends(const __grid_constant__ ForwardCall<Real> call) {
  using M = Map<P>;
  __shared__ ForwardTile<P> shared;
  const Inputs<Real>& in = call.in;
  const Sizes& s = in.s;
  const Place<P> place(s);
  const States rates = load_rates(in.a_log, s, place);
  const bool there = place.d < s.D;
  const float bias = there ? in.dt_bias[place.d] : 0.0f;
  States h;
  h.fill(0);
  float time[2] = {0, 0};  // the sum of delta
  bool cut = false;        // a document starts in this part: nothing gets through
  Elements<Real, P> u, dt;
  Cells<Real, P> cells;
  for (int tile = place.first_tile; tile < place.last_tile; ++tile) {
    u.load(in.u, s, place, tile);
    dt.load(in.dt, s, place, tile);
    cells.load(in.b, in.c, s, place, tile);
#pragma unroll
    for (int j = 0; j < M::kElements; ++j) {
      const int t = place.row + j * M::kRows;
      if (t < kTile)
        shared.put(t, place.channel, there ? softplus(to_float(dt.at[j]) + bias) : 0.0f,
                   to_float(u.at[j]));
    }
    cells.stage(&shared.cells[0][0][0]);
    const unsigned starts = starts_of(in.starts, s, place, tile);
    const int steps = place.steps(s, tile);
    cut |= starts != 0;
    __syncthreads();
#pragma unroll 2
    for (int t = 0; t < steps; ++t) {
      if (starts >> t & 1) h.fill(0);
      const float4 delta = shared.deltas[t][place.pair];
      time[0] += delta.x;
      time[1] += delta.y;
      advance(h, rates, delta, shared.cell(t, 0, place.p));
    }
    __syncthreads();
  }
  States decays;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    decays.at[i / 4][i % 4] = cut ? 0.0f : exp2_of(time[i / 4] * rates.at[i / 4][i % 4]);
  h.store(call.ends, blockIdx.x, place);
  decays.store(call.decays, blockIdx.x, place);
}

}  // namespace
}  // namespace scan

void run_cuda(Stream& stream, const ScanForward& op) {
  const scan::Sizes s =
      scan::sizes_of(op.sequences, op.u.rows(), op.u.cols(), op.a_log.cols());
  if (s.grid() == 0) return;
  const int64_t parts = s.splits > 1 ? s.grid() * 1024 : 0;
  float* const ends = parts ? reinterpret_cast<float*>(stream.workspace(size_t(parts) * 8)) : nullptr;
  float* const decays = ends + parts;
  scan::visit(op.u.dtype, s.P, [&]<class Real, int P>() {
    scan::ForwardCall<Real> call{.in = {s, op},
                                 .y = scan::Rows<Real>(op.y),
                                 .final = scan::Rows<float>(op.final),
                                 .states = pointer<float4>(op.states),
                                 .entering = reinterpret_cast<const float4*>(ends),
                                 .ends = reinterpret_cast<float4*>(ends),
                                 .decays = reinterpret_cast<float4*>(decays)};
    const unsigned grid = grid_of(s.grid());
    if (ends) {
      scan::find_ends<Real, P><<<grid, scan::kThreads, 0, native(stream)>>>(call);
      scan::carry_over_parts<P>
          <<<grid_of(s.units() * 1024 / scan::kThreads), scan::kThreads, 0, native(stream)>>>(
              s, ends, decays, call.in.initial, false);
    }
    scan::forward<Real, P><<<grid, scan::kThreads, 0, native(stream)>>>(call);
  });
  cuda_check(cudaGetLastError(), op.name);
}

}  // namespace moemamba
