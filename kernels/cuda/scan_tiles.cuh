#pragma once
#include <algorithm>
#include <initializer_list>

#include "kernels/cuda/strided.cuh"
#include "kernels/scan.h"

// What the scan's kernels share: how channels, states and time are cut.
//
// A block owns 256 / P channels of one sequence and walks over time in tiles of kTile steps; P
// threads share a pair of channels. Thread x holds the states H p .. H p + H - 1, p = x % P, of the
// channels 2 g and 2 g + 1, g = x / P, in registers; H P >= N, and H = 4 but where forward takes
// another. What is alike for all states (softplus, gates) is done once per element, by threads that
// lie along the pairs of channels, so that rows are read and written coalesced, both channels at
// once where all rows lie on pairs, and handed over through shared memory; the rows of the next
// tile are loaded into registers while this one is computed.
//
// kTile is a compromise: forward stores 4 N / kTile bytes of states per (t, d), and backward keeps
// 4 KiB of shared memory per step; 14 steps let three blocks of backward share a multiprocessor.
// Too few channels to fill a GPU: time is split, too; one pass finds what a part does to the state
// that enters it (a decay and an end), one carries the states over the parts, the third is real.
namespace moemamba::scan {

constexpr int kThreads = 128;
constexpr int kTile = int(kScanTile);
constexpr int kFew = 100;  // units (blocks with H = 4 of a sequence) that want a split of time
constexpr int kForwardBlocks = 1024, kBackwardBlocks = 384;  // that it aims at
constexpr float kLog2e = 1.44269504f, kLn2 = 0.69314718f;

template <int P, int H = 4>
struct Map {
  static constexpr int kStates = H * P;
  static constexpr int kPairs = kThreads / P;
  static constexpr int kChannels = 2 * kPairs;
  static constexpr int kRows = P;  // steps that the threads take at once, a pair each
  static constexpr int kPasses = (kTile + kRows - 1) / kRows;
  static constexpr int kKeptPairs = 4 * kThreads / kStates;  // kPairs where H = 4
  static constexpr int kSums = 1024 + 2 * kChannels;  // of a block: da_log, dskip, ddt_bias
};

struct Sizes {
  int64_t B, L;
  int D, N, P;
  int blocks, splits, tiles, tiles_of_split;  // blocks of channels (H = 4), parts, tiles of time
  int64_t units() const { return B * blocks; }
  int64_t grid() const { return units() * splits; }
};

inline Sizes sizes_of(int64_t B, int64_t T, int64_t D, int64_t N, int most_blocks) {
  check(D < (1 << 30) && T < (int64_t{1} << 30) * kTile, "a scan of ", T, " x ", D);
  Sizes s{.B = B, .L = B ? T / B : 0, .D = int(D), .N = int(N)};
  s.P = N <= 8 ? 2 : N <= 16 ? 4 : N <= 32 ? 8 : 16;
  s.blocks = int(ceil_divide(D, 256 / s.P));
  s.tiles = int(ceil_divide(s.L, kTile));
  s.splits = 1;
  s.tiles_of_split = s.tiles;
  if (s.units() > 0 && s.units() <= kFew && s.tiles >= 8) {
    const int64_t wanted = std::min<int64_t>(most_blocks / s.units(), s.tiles / 4);
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

// What both passes read; both operators have these fields.
template <class Real>
struct Inputs {
  Sizes s;
  Strided<Real> u, dt, b, c, z;
  Strided<float> a_log, initial;
  const float *dt_bias, *skip;
  const uint8_t* starts;
  bool in_pairs;  // rows of u, dt, z and of what is written like them lie on pairs of channels

  template <class Op>
  Inputs(const Sizes& sizes, const Op& op, bool pairs)
      : s(sizes), u(op.u), dt(op.dt), b(op.b), c(op.c), z(op.z), a_log(op.a_log),
        initial(op.initial), dt_bias(pointer<float>(op.dt_bias)), skip(pointer<float>(op.skip)),
        starts(pointer<const uint8_t>(op.starts)), in_pairs(pairs) {}
};

inline bool lie_on_pairs(std::initializer_list<Tensor> tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const Tensor& tensor) {
    return !tensor || aligned(tensor, size_t(2 * size_of(tensor.dtype)));
  });
}

// Kernels multiply steps of a tile by strides of 32 bits.
inline void check_strides(std::initializer_list<Tensor> tensors) {
  for (const Tensor& tensor : tensors)
    check(!tensor || (tensor.stride >= 0 && tensor.stride < (int64_t{1} << 31)),
          "a scan of rows that lie ", tensor.stride, " elements apart");
}

// The tokens of a tile.
struct Span {
  int64_t token;
  int steps;
};

// What a block works on, and this thread's place in it.
template <int P, int H = 4>
struct Place {
  int block, split, first_tile, last_tile;  // one past the last
  int64_t sequence;
  int p = int(threadIdx.x) % P, pair = int(threadIdx.x) / P;                      // of the states
  int column = int(threadIdx.x) % Map<P, H>::kPairs, row = int(threadIdx.x) / Map<P, H>::kPairs;
  int d, channels;  // along the pairs: the pair's first channel, and how many of both there are
  int read;         // d, or a first channel that is there

  __device__ Place(const Sizes& s, int blocks) {
    block = int(blockIdx.x % unsigned(blocks));
    const unsigned rest = blockIdx.x / unsigned(blocks);
    split = int(rest % unsigned(s.splits));
    sequence = rest / unsigned(s.splits);
    first_tile = split * s.tiles_of_split;
    last_tile = min(s.tiles, first_tile + s.tiles_of_split);
    d = block * Map<P, H>::kChannels + 2 * column;
    channels = max(0, min(2, s.D - d));
    read = channels > 0 ? d : 0;
  }
  __device__ int d_of(int ch) const { return block * Map<P, H>::kChannels + 2 * pair + ch; }
  __device__ Span span(const Sizes& s, int tile) const {
    const int64_t first = int64_t(tile) * kTile;
    return {sequence * s.L + first, int(min(int64_t(kTile), s.L - first))};
  }
};

// One value of each of a thread's states. Kept in items of [s.blocks][2][kKeptPairs][kStates], 1024
// floats for each block of channels, whatever H.
template <int H = 4>
struct States {
  float at[2][H];
  __device__ void fill(float value) {
#pragma unroll
    for (int i = 0; i < 2 * H; ++i) at[i / H][i % H] = value;
  }
  template <int P>
  __device__ void load(const float4* from, int64_t item, const Sizes& s, const Place<P, H>& place) {
    const float* own = floats<P>(from, item, s, place);
    if (!own) return fill(0);
#pragma unroll
    for (int i = 0; i < 2 * H; i += kWidth) {
      const auto wide = *reinterpret_cast<const Pack<float, kWidth>*>(own + i / H * 512 + i % H);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) at[i / H][i % H + k] = wide.at[k];
    }
  }
  template <int P>
  __device__ void store(float4* to, int64_t item, const Sizes& s, const Place<P, H>& place) const {
    float* own = const_cast<float*>(floats<P>(to, item, s, place));
    if (!own) return;
#pragma unroll
    for (int i = 0; i < 2 * H; i += kWidth) {
      Pack<float, kWidth> wide;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) wide.at[k] = at[i / H][i % H + k];
      *reinterpret_cast<Pack<float, kWidth>*>(own + i / H * 512 + i % H) = wide;
    }
  }
  // Rows [B, D, N]; zeros where there are none, or beyond D and N.
  template <int P>
  __device__ void load(const Strided<float>& from, const Sizes& s, const Place<P, H>& place) {
#pragma unroll
    for (int i = 0; i < 2 * H; ++i) {
      const int d = place.d_of(i / H), n = H * place.p + i % H;
      const bool there = from.at && d < s.D && n < s.N;
      at[i / H][i % H] = there ? from.row(place.sequence * s.D + d)[n] : 0.0f;
    }
  }
  template <int P>
  __device__ void store(const Strided<float>& to, const Sizes& s, const Place<P, H>& place) const {
#pragma unroll
    for (int i = 0; i < 2 * H; ++i) {
      const int d = place.d_of(i / H), n = H * place.p + i % H;
      if (d < s.D && n < s.N) to.row(place.sequence * s.D + d)[n] = at[i / H][i % H];
    }
  }
  __device__ float4 get(int ch) const {
    return make_float4(at[ch][0], at[ch][1], at[ch][2], at[ch][3]);
  }
  __device__ void set(int ch, float4 v) {
    at[ch][0] = v.x, at[ch][1] = v.y, at[ch][2] = v.z, at[ch][3] = v.w;
  }

 private:
  static constexpr int kWidth = H < 4 ? 2 : 4;
  // The first of channel 0; channel 1 lies 512 behind. Null beyond the blocks that are kept.
  template <int P>
  __device__ static const float* floats(const float4* all, int64_t item, const Sizes& s,
                                        const Place<P, H>& place) {
    constexpr int kKept = Map<P, H>::kKeptPairs;
    const int pair = place.block * Map<P, H>::kPairs + place.pair, block = pair / kKept;
    if (block >= s.blocks) return nullptr;
    return reinterpret_cast<const float*>(all) + (item * s.blocks + block) * 1024 +
           pair % kKept * Map<P, H>::kStates + H * place.p;
  }
};

// A log2(e), so that exp(delta A) = exp2(delta rate); 0 beyond D and N.
template <int P, int H>
__device__ States<H> load_rates(const Strided<float>& a_log, const Sizes& s,
                                const Place<P, H>& place) {
  States<H> rates;
#pragma unroll
  for (int i = 0; i < 2 * H; ++i) {
    const int d = place.d_of(i / H), n = H * place.p + i % H;
    rates.at[i / H][i % H] = d < s.D && n < s.N ? -expf(a_log.row(d)[n]) * kLog2e : 0.0f;
  }
  return rates;
}

// One value of both channels of a thread's pair along the channels; 0 beyond D.
template <int P, int H>
__device__ float2 load_pair(const float* from, const Place<P, H>& place) {
  return make_float2(place.channels > 0 ? from[place.d] : 0.0f,
                     place.channels > 1 ? from[place.d + 1] : 0.0f);
}

__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float sigmoid(float x) {
  return reciprocal(1.0f + exp2_of(-kLog2e * x));
}

// log(1 + e^x) = max(x, 0) + log1p(e), e = e^-|x|. log1p(e) / e on [0, 1] is a polynomial fitted at
// Chebyshev's nodes: within 1.5e-7 in f32, one exp2 and no branch.
__device__ __forceinline__ float softplus(float x) {
  const float e = exp2_of(-kLog2e * fabsf(x));
  float p = fmaf(5.253457930e-03f, e, -2.958850749e-02f);
  p = fmaf(p, e, 7.836166769e-02f);
  p = fmaf(p, e, -1.367477030e-01f);
  p = fmaf(p, e, 1.911143064e-01f);
  p = fmaf(p, e, -2.484436929e-01f);
  p = fmaf(p, e, 3.331927061e-01f);
  p = fmaf(p, e, -4.999950230e-01f);
  p = fmaf(p, e, 1.0f);
  return fmaf(p, e, fmaxf(x, 0.0f));
}

// A pair's elements of one row, in flight.
template <class Real>
struct Two;
template <>
struct Two<float> {
  float2 raw;
  __device__ static Two both(const float* from) {
    return {*reinterpret_cast<const float2*>(from)};
  }
  __device__ static Two each(const float* from, int second) {
    return {make_float2(from[0], from[second])};
  }
  __device__ float2 get() const { return raw; }
};
template <>
struct Two<__nv_bfloat16> {
  unsigned raw;
  __device__ static Two both(const __nv_bfloat16* from) {
    return {*reinterpret_cast<const unsigned*>(from)};
  }
  __device__ static Two each(const __nv_bfloat16* from, int second) {
    return {__bfloat16_as_ushort(from[0]) | unsigned(__bfloat16_as_ushort(from[second])) << 16};
  }
  __device__ float2 get() const {
    return make_float2(__uint_as_float(raw << 16), __uint_as_float(raw & 0xffff0000u));
  }
};

// Writes a pair's `channels`, none, one or both; not one, where in_pairs.
__device__ __forceinline__ void put_pair(float* to, float2 x, int channels, bool in_pairs) {
  if (in_pairs && channels > 0) *reinterpret_cast<float2*>(to) = x;
  if (!in_pairs && channels > 0) to[0] = x.x;
  if (!in_pairs && channels > 1) to[1] = x.y;
}
__device__ __forceinline__ void put_pair(__nv_bfloat16* to, float2 x, int channels, bool in_pairs) {
  const __nv_bfloat162 narrow = __floats2bfloat162_rn(x.x, x.y);
  if (in_pairs && channels > 0) *reinterpret_cast<__nv_bfloat162*>(to) = narrow;
  if (!in_pairs && channels > 0) to[0] = narrow.x;
  if (!in_pairs && channels > 1) to[1] = narrow.y;
}

// softplus(x + bias) of a pair; 0 beyond D, and where there is no step.
template <int P, int H>
__device__ __forceinline__ float2 deltas_of(float2 x, float2 bias, const Place<P, H>& place,
                                            bool there) {
  const float d0 = softplus(x.x + bias.x), d1 = softplus(x.y + bias.y);
  const int channels = there ? place.channels : 0;
  return make_float2(channels > 0 ? d0 : 0.0f, channels > 1 ? d1 : 0.0f);
}

// A thread's elements of one tensor's tile, in flight: steps row, row + kRows .. of its pair. Those
// beyond the sequence and D are elements of its last step and of other channels, which saves a
// branch; delta is zero there, and what they come to is not written.
template <class Real, int P, int H = 4>
struct Elements {
  static constexpr int kPasses = Map<P, H>::kPasses, kRows = Map<P, H>::kRows;
  Two<Real> at[kPasses];
  __device__ void load(const Strided<Real>& from, const Place<P, H>& place, const Span& span,
                       bool in_pairs) {
    const Real* first = from.row(span.token) + place.read;
    const int stride = int(from.stride), second = place.channels > 1;
    const auto row = [&](int j) {
      return first + int64_t(min(place.row + j * kRows, span.steps - 1)) * stride;
    };
    if (in_pairs) {
#pragma unroll
      for (int j = 0; j < kPasses; ++j) at[j] = Two<Real>::both(row(j));
    } else {
#pragma unroll
      for (int j = 0; j < kPasses; ++j) at[j] = Two<Real>::each(row(j), second);
    }
  }
};

// A thread's part of the tile of b and c, in flight; then f32 [kTile][2][kStates] in shared memory.
// Zero beyond N; beyond the sequence, those of its last step.
template <class Real, int kStates>
struct Cells {
  static constexpr int kAll = kTile * 2 * kStates, kCount = (kAll + kThreads - 1) / kThreads;
  static constexpr int kRows = kThreads / (2 * kStates);
  Real at[kCount];
  __device__ void load(const Strided<Real>& b, const Strided<Real>& c, int N, const Span& span) {
    const int n = int(threadIdx.x) % kStates, t = int(threadIdx.x) / (2 * kStates);
    const Strided<Real>& from = int(threadIdx.x) / kStates % 2 == 0 ? b : c;
    const Real* first = from.row(span.token) + min(n, N - 1);
    const int stride = int(from.stride);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const Real x = first[int64_t(min(t + j * kRows, span.steps - 1)) * stride];
      at[j] = n < N ? x : from_float<Real>(0.0f);
    }
  }
  __device__ void stage(float* to) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int i = int(threadIdx.x) + j * kThreads;
      if (i < kAll) to[i] = to_float(at[j]);
    }
  }
};

// Bit t: a document starts at step t of the tile. The same in all threads.
__device__ inline unsigned starts_of(const uint8_t* starts, const Span& span) {
  if (!starts) return 0;
  const int lane = int(threadIdx.x) % 32;
  return __ballot_sync(0xffffffffu, lane < span.steps && starts[span.token + lane] != 0);
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
__global__ void carry_over_parts(Sizes s, float* ends, const float* decays, Strided<float> edge,
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
