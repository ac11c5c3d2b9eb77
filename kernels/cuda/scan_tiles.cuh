#pragma once
#include <algorithm>

#include "kernels/cuda/common.cuh"
#include "kernels/scan.h"

// What the scan's kernels share: how channels, states and time are cut.
//
// A block owns 256 / P channels of one sequence (a unit) and walks over time in tiles of kTile
// steps; 4 P >= N states, P threads a channel pair. Thread x holds the states 4 p .. 4 p + 3,
// p = x % P, of the channels 2 g and 2 g + 1, g = x / P, in registers. What is alike for all states
// (softplus, gates) is done once per element by threads that lie along the channels, so that rows
// are read and written coalesced at any alignment, and handed over through shared memory; the rows
// of the next tile are loaded into registers while this one is computed.
//
// kTile is a compromise: forward stores 4 N / kTile bytes of states per (t, d), and backward keeps
// 4 KiB of shared memory per step; 14 steps let three blocks of backward share a multiprocessor.
// Too few units to fill a GPU: time is split, too; one pass finds what a part does to the state
// that enters it (a decay and an end), one carries the states over the parts, the third is real.
namespace moemamba::scan {

constexpr int kThreads = 128;
constexpr int kTile = int(kScanTile);
constexpr int kFew = 100, kBlocks = 384;  // units that want a split, and blocks that it aims at
constexpr float kLog2e = 1.44269504f, kLn2 = 0.69314718f;

template <int P>
struct Map {
  static constexpr int kStates = 4 * P;
  static constexpr int kChannels = 256 / P;
  static constexpr int kPairs = kThreads / P;
  static constexpr int kRows = kThreads / kChannels;  // steps that the threads take at once
  static constexpr int kElements = (kTile + kRows - 1) / kRows;
  static constexpr int kCells = (kTile * 2 * kStates + kThreads - 1) / kThreads;
  static constexpr int kSums = 1024 + 2 * kChannels;  // of a block: da_log, dskip, ddt_bias
};

struct Sizes {
  int64_t B, L;
  int D, N, P;
  int blocks, splits, tiles, tiles_of_split;  // blocks of channels, parts and tiles of time
  int64_t units() const { return B * blocks; }
  int64_t grid() const { return units() * splits; }
};

inline Sizes sizes_of(int64_t B, int64_t T, int64_t D, int64_t N) {
  check(D < (1 << 30) && T < (int64_t{1} << 30) * kTile, "a scan of ", T, " x ", D);
  Sizes s{.B = B, .L = B ? T / B : 0, .D = int(D), .N = int(N)};
  s.P = N <= 8 ? 2 : N <= 16 ? 4 : N <= 32 ? 8 : 16;
  s.blocks = int(ceil_divide(D, 256 / s.P));
  s.tiles = int(ceil_divide(s.L, kTile));
  s.splits = 1;
  s.tiles_of_split = s.tiles;
  if (s.units() > 0 && s.units() <= kFew && s.tiles >= 8) {
    const int64_t wanted = std::min<int64_t>(kBlocks / s.units(), s.tiles / 4);
    s.tiles_of_split = int(ceil_divide(s.tiles, wanted));
    s.splits = int(ceil_divide(s.tiles, s.tiles_of_split));
  }
  return s;
}

// fn.operator()<Real, P>()
template <class Fn>
void visit(DType dtype, int P, Fn&& fn) {
  visit_real(dtype, [&]<class Real>() {
    if (P == 2) fn.template operator()<Real, 2>();
    else if (P == 4) fn.template operator()<Real, 4>();
    else if (P == 8) fn.template operator()<Real, 8>();
    else fn.template operator()<Real, 16>();
  });
}

template <class Real>
struct Rows {
  Real* at = nullptr;
  int64_t stride = 0;
  explicit Rows(const Tensor& tensor) : at(pointer<Real>(tensor)), stride(tensor.stride) {}
  __device__ Real* row(int64_t r) const { return at + r * stride; }
};

// What both passes read; both operators have these fields.
template <class Real>
struct Inputs {
  Sizes s;
  Rows<Real> u, dt, b, c, z;
  Rows<float> a_log, initial;
  const float *dt_bias, *skip;
  const uint8_t* starts;

  template <class Op>
  Inputs(const Sizes& sizes, const Op& op)
      : s(sizes), u(op.u), dt(op.dt), b(op.b), c(op.c), z(op.z), a_log(op.a_log),
        initial(op.initial), dt_bias(pointer<float>(op.dt_bias)), skip(pointer<float>(op.skip)),
        starts(pointer<const uint8_t>(op.starts)) {}
};

// What a block works on, and this thread's place in it.
template <int P>
struct Place {
  int block, split, first_tile, last_tile;  // one past the last
  int64_t sequence;
  int p = int(threadIdx.x) % P, pair = int(threadIdx.x) / P;            // as holder of states
  int channel = int(threadIdx.x) % Map<P>::kChannels, d;                // along the channels
  int row = int(threadIdx.x) / Map<P>::kChannels;

  __device__ explicit Place(const Sizes& s) {
    block = int(blockIdx.x % unsigned(s.blocks));
    const unsigned rest = blockIdx.x / unsigned(s.blocks);
    split = int(rest % unsigned(s.splits));
    sequence = rest / unsigned(s.splits);
    first_tile = split * s.tiles_of_split;
    last_tile = min(s.tiles, first_tile + s.tiles_of_split);
    d = block * Map<P>::kChannels + channel;
  }
  __device__ int d_of(int ch) const { return block * Map<P>::kChannels + 2 * pair + ch; }
  __device__ int64_t token(const Sizes& s, int tile) const {
    return sequence * s.L + int64_t(tile) * kTile;
  }
  __device__ int steps(const Sizes& s, int tile) const {
    return int(min(int64_t(kTile), s.L - int64_t(tile) * kTile));
  }
  // Where the states of an item (one of a count of 1024 floats) are.
  __device__ int64_t cell(int64_t item, int ch) const {
    return (item * 2 + ch) * kThreads + threadIdx.x;
  }
};

// One value of each of a thread's states.
struct States {
  float at[2][4];
  __device__ void fill(float value) {
#pragma unroll
    for (int i = 0; i < 8; ++i) at[i / 4][i % 4] = value;
  }
  template <int P>
  __device__ void load(const float4* from, int64_t item, const Place<P>& place) {
#pragma unroll
    for (int ch = 0; ch < 2; ++ch) set(ch, from[place.cell(item, ch)]);
  }
  template <int P>
  __device__ void store(float4* to, int64_t item, const Place<P>& place) const {
#pragma unroll
    for (int ch = 0; ch < 2; ++ch) to[place.cell(item, ch)] = get(ch);
  }
  // Rows [B, D, N]; zeros where there are none, or beyond D and N.
  template <int P>
  __device__ void load(const Rows<float>& from, const Sizes& s, const Place<P>& place) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int d = place.d_of(i / 4), n = 4 * place.p + i % 4;
      const bool there = from.at && d < s.D && n < s.N;
      at[i / 4][i % 4] = there ? from.row(place.sequence * s.D + d)[n] : 0.0f;
    }
  }
  template <int P>
  __device__ void store(const Rows<float>& to, const Sizes& s, const Place<P>& place) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int d = place.d_of(i / 4), n = 4 * place.p + i % 4;
      if (d < s.D && n < s.N) to.row(place.sequence * s.D + d)[n] = at[i / 4][i % 4];
    }
  }
  __device__ float4 get(int ch) const {
    return make_float4(at[ch][0], at[ch][1], at[ch][2], at[ch][3]);
  }
  __device__ void set(int ch, float4 v) {
    at[ch][0] = v.x, at[ch][1] = v.y, at[ch][2] = v.z, at[ch][3] = v.w;
  }
};

// A log2(e), so that exp(delta A) = exp2(delta rate); 0 beyond D and N.
template <int P>
__device__ States load_rates(const Rows<float>& a_log, const Sizes& s, const Place<P>& place) {
  States rates;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int d = place.d_of(i / 4), n = 4 * place.p + i % 4;
    rates.at[i / 4][i % 4] = d < s.D && n < s.N ? -expf(a_log.row(d)[n]) * kLog2e : 0.0f;
  }
  return rates;
}

__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float sigmoid(float x) {
  return __fdividef(1.0f, 1.0f + exp2_of(-kLog2e * x));
}
__device__ __forceinline__ float softplus(float x) {
  return x > 20.0f ? x : log1pf(exp2_of(kLog2e * x));
}

// A thread's elements of one tensor's tile, in flight: steps row, row + kRows .. of its channel.
template <class Real, int P>
struct Elements {
  Real at[Map<P>::kElements];
  __device__ void load(const Rows<Real>& from, const Sizes& s, const Place<P>& place, int tile) {
    const int steps = place.steps(s, tile);
    const int64_t token = place.token(s, tile);
#pragma unroll
    for (int j = 0; j < Map<P>::kElements; ++j) {
      const int t = place.row + j * Map<P>::kRows;
      at[j] = t < steps && place.d < s.D ? from.row(token + t)[place.d] : from_float<Real>(0.0f);
    }
  }
};

// A thread's part of the tile of b and c, in flight; then f32 [kTile][2][kStates] in shared memory.
template <class Real, int P>
struct Cells {
  Real at[Map<P>::kCells];
  __device__ void load(const Rows<Real>& b, const Rows<Real>& c, const Sizes& s,
                       const Place<P>& place, int tile) {
    constexpr int kStates = Map<P>::kStates;
    const int steps = place.steps(s, tile);
    const int64_t token = place.token(s, tile);
#pragma unroll
    for (int j = 0; j < Map<P>::kCells; ++j) {
      const int i = int(threadIdx.x) + j * kThreads, t = i / (2 * kStates), n = i % kStates;
      const Real* const from = i / kStates % 2 == 0 ? b.row(token + t) : c.row(token + t);
      at[j] = t < steps && n < s.N ? from[n] : from_float<Real>(0.0f);
    }
  }
  __device__ void stage(float* to) const {
#pragma unroll
    for (int j = 0; j < Map<P>::kCells; ++j) {
      const int i = int(threadIdx.x) + j * kThreads;
      if (i < kTile * 2 * Map<P>::kStates) to[i] = to_float(at[j]);
    }
  }
};

// Bit t: a document starts at step t of the tile. The same in all threads.
template <int P>
__device__ unsigned starts_of(const uint8_t* starts, const Sizes& s, const Place<P>& place,
                              int tile) {
  if (!starts) return 0;
  const int lane = int(threadIdx.x) % 32;
  const bool start = lane < place.steps(s, tile) && starts[place.token(s, tile) + lane] != 0;
  return __ballot_sync(0xffffffffu, start);
}

// The P threads of a pair add up what they have of channel 0 and 1; every thread gets the sum of
// channel p % 2.
template <int P>
__device__ __forceinline__ float sum_states(float of_0, float of_1, int p) {
  const float kept = p % 2 ? of_1 : of_0, sent = p % 2 ? of_0 : of_1;
  float sum = kept + __shfl_xor_sync(0xffffffffu, sent, 1);
#pragma unroll
  for (int step = 2; step < P; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  return sum;
}

// What enters each part of time, from what the parts do: in place of `ends`. One thread per state
// of a unit, parts in order, or backward in time. Reads and writes a few MB: bound by latency.
template <int P>
__global__ void carry_over_parts(Sizes s, float* ends, const float* decays, Rows<float> edge,
                                 bool backward) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;  // 1024 a unit: no remainder
  const int cell = int(i % 1024), thread = cell % 512 / 4;
  const int64_t unit = i / 1024, sequence = unit / s.blocks, block = unit % s.blocks;
  const int64_t d = block * Map<P>::kChannels + 2 * (thread / P) + cell / 512;
  const int n = 4 * (thread % P) + cell % 4;
  float state = edge.at && d < s.D && n < s.N ? edge.row(sequence * s.D + d)[n] : 0.0f;
  for (int k = 0; k < s.splits; ++k) {
    const int split = backward ? s.splits - 1 - k : k;
    const int64_t at = ((sequence * s.splits + split) * s.blocks + block) * 1024 + cell;
    const float end = ends[at];
    ends[at] = state;
    state = fmaf(decays[at], state, end);
  }
}

// Cuts a workspace into parts on 64-byte borders; counts their bytes where there is no memory yet.
class Cutter {
 public:
  explicit Cutter(std::byte* memory = nullptr) : memory_(memory) {}
  float* floats(int64_t count) {
    std::byte* part = memory_ ? memory_ + bytes_ : nullptr;
    bytes_ += size_t(ceil_divide(count * 4, 64) * 64);
    return reinterpret_cast<float*>(part);
  }
  size_t bytes() const { return bytes_; }

 private:
  std::byte* memory_;
  size_t bytes_ = 0;
};

}  // namespace moemamba::scan
