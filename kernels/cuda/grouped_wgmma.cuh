#pragma once
#include "kernels/cuda/grouped_tiles.cuh"
#include "kernels/cuda/hopper.cuh"

namespace moemamba {

// Grouped products of bf16 by wgmma and TMA (sm_90a alone).
namespace grouped_wgmma {

using Real = __nv_bfloat16;

// Two warpgroups compute 64 x 256 each of a tile, a third brings operands ahead of them.
constexpr int kConsumers = 2, kThreads = (kConsumers + 1) * 128, kProducerWarp = kConsumers * 4;
constexpr int kRows = kConsumers * 64, kCols = 256, kDepth = 64, kStages = 4, kSums = kCols / 2;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // 64,512 of 65,536 in all
static_assert(128 * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536);

// In a stage, a's part lies before b's. A tile that runs along K has a row of 64 (128 bytes) for
// each of M or N; one that runs across K lies in panels of 64 of M or N, with a row for each of K.
constexpr uint32_t kPanelBytes = kDepth * hopper::kRowBytes;
constexpr uint32_t kABytes = kRows * kDepth * sizeof(Real), kBBytes = kCols * kDepth * sizeof(Real);
constexpr uint32_t kStageBytes = kABytes + kBBytes;  // 48 KiB
static_assert(kPanelBytes % hopper::kPatternBytes == 0 && kABytes == kConsumers * kPanelBytes);

// The boxes that TMA brings: rows of 64 elements.
constexpr int kBoxCols = kDepth;
constexpr int a_box_rows(GroupedKind kind) { return kind == GroupedKind::outer ? kDepth : kRows; }
constexpr int b_box_rows(GroupedKind kind) {
  return kind == GroupedKind::matmul_b_transposed ? kCols : kDepth;
}

// The stages, full and empty, as a role of the block walks over them, and their barriers.
struct Ring {
  uint32_t memory, full, empty;  // addresses; a barrier has 8 bytes
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ uint32_t a() const { return memory + uint32_t(stage) * kStageBytes; }
  __device__ __forceinline__ uint32_t b() const { return a() + kABytes; }
  __device__ __forceinline__ uint32_t when_full() const { return full + uint32_t(stage) * 8; }
  __device__ __forceinline__ uint32_t when_empty() const { return empty + uint32_t(stage) * 8; }
  __device__ __forceinline__ void next() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

// This block's tiles, one after another: blockIdx.x, + gridDim.x, ... in the order of GroupedTiles.
template <GroupedKind kKind, class Out>
struct Walk {
  static constexpr bool outer = kKind == GroupedKind::outer;

  const GroupedWork<Real, Out>& work;
  const int* first;  // of matmul: count_tiles's result
  int across, count, index;
  // Of the tile: its group; its first row (of a and out; outer: of out[group]) and column; how many
  // rows out has left from there, may exceed a tile; where K begins among the rows of outer.
  int group = 0, row = 0, col = 0, rows = 0, begin = 0, K = 0;

  __device__ __forceinline__ Walk(const GroupedWork<Real, Out>& work, const int* first)
      : work(work), first(first), across((work.N + kCols - 1) / kCols), index(blockIdx.x) {
    if constexpr (outer)
      count = work.groups * ((work.M + kRows - 1) / kRows) * across;
    else
      count = first[work.groups] * across;
    find();
  }
  __device__ __forceinline__ bool more() const { return index < count; }
  __device__ __forceinline__ void next() {
    index += gridDim.x;
    find();
  }
  __device__ __forceinline__ int stages() const { return max((K + kDepth - 1) / kDepth, 1); }
  __device__ __forceinline__ int cols() const { return work.N - col; }
  __device__ __forceinline__ Out* out() const {
    const int64_t out_row = outer ? int64_t(group) * work.M + row : row;
    return work.out + out_row * work.out_stride + col;
  }
  // Of what is read when the tile is stored: what out has before it is added to, and the masks.
  __device__ __forceinline__ void prefetch(int lane) const {
    const auto bring = [&](const auto* from, int64_t stride) {
      const auto bytes = uint32_t(min(cols(), kCols) * int(sizeof(*from)) / 16 * 16);
      for (int r = lane; r < min(rows, kRows) && bytes > 0; r += 32)
        hopper::prefetch_bytes(from + r * stride, bytes);
    };
    if (outer && work.accumulate && work.wide_out) bring(out(), work.out_stride);
    if (!outer && work.positive)
      bring(work.positive + row * work.positive_stride + col, work.positive_stride);
  }

 private:
  __device__ __forceinline__ void find() {
    for (; index < count; index += gridDim.x) {
      const int down = index / across;
      col = (index - down * across) * kCols;
      if constexpr (outer) {
        const int of_group = (work.M + kRows - 1) / kRows;
        group = down / of_group;
        row = (down - group * of_group) * kRows;
        rows = work.M - row;
        const int2 range = group_rows(work.offsets, group, work.rows);
        begin = range.x;
        K = range.y;
        if (K == 0 && work.accumulate) continue;  // adds nothing
      } else {
        while (first[group + 1] <= down) ++group;  // down < first[groups], and it never goes back
        const int2 range = group_rows(work.offsets, group, work.rows);
        const int before = (down - first[group]) * kRows;
        row = range.x + before;
        rows = range.y - before;
        K = work.K;
      }
      return;
    }
  }
};

// Fills the stages. One warp; lane 0 starts the copies. What the tile's end reads comes into L2
// meanwhile.
template <GroupedKind kKind, class Walk>
__device__ __forceinline__ void produce(const CUtensorMap& a, const CUtensorMap& b, Walk walk,
                                        Ring ring) {
  constexpr bool outer = kKind == GroupedKind::outer;
  const int lane = threadIdx.x % 32;
  for (; walk.more(); walk.next()) {
    walk.prefetch(lane);
    const int stages = walk.stages();
    for (int s = 0; s < stages; ++s, ring.next()) {
      const int k = s * kDepth;
      hopper::wait(ring.when_empty(), ring.parity ^ 1);
      if (lane == 0) {
        const uint32_t full = ring.when_full();
        hopper::arrive_expecting(full, kStageBytes);
        if constexpr (outer) {
#pragma unroll
          for (int p = 0; p < kRows / 64; ++p)
            hopper::bring_box(ring.a() + p * kPanelBytes, a, full, walk.row + p * 64,
                              walk.begin + k, 0);
        } else {
          hopper::bring_box(ring.a(), a, full, k, walk.row, 0);
        }
        if constexpr (kKind == GroupedKind::matmul_b_transposed) {
          hopper::bring_box(ring.b(), b, full, k, walk.col, walk.group);
        } else {
#pragma unroll
          for (int p = 0; p < kCols / 64; ++p)
            hopper::bring_box(ring.b() + p * kPanelBytes, b, full, walk.col + p * 64,
                              outer ? walk.begin + k : k, outer ? 0 : walk.group);
        }
      }
      __syncwarp();
    }
  }
}

// Clears the rows of K from `there` on in all panels of a stage: they are the next group's, or
// nobody's, and need not be finite. Called by all consumers.
__device__ __forceinline__ void clear_rows(std::byte* stage, int there) {
  constexpr int kPanels = int(kStageBytes / kPanelBytes), kPieces = int(hopper::kRowBytes) / 16;
  const int rows = kDepth - max(there, 0), pieces = rows * kPieces;  // of 16 bytes, in a panel
  for (int i = int(threadIdx.x); i < kPanels * pieces; i += kConsumers * 128) {
    const int panel = i / pieces, piece = i - panel * pieces;
    std::byte* from = stage + panel * int(kPanelBytes) + (kDepth - rows) * int(hopper::kRowBytes);
    *reinterpret_cast<uint4*>(from + piece * 16) = {0, 0, 0, 0};
  }
  hopper::publish_stores();
  asm volatile("bar.sync 1, %0;" ::"n"(kConsumers * 128) : "memory");
}

// sums (+)= this warpgroup's 64 rows of a's part of the stage times b's part.
template <GroupedKind kKind>
__device__ __forceinline__ void multiply_stage(float (&sums)[kSums], const Ring& ring,
                                               int warpgroup, bool add) {
  constexpr bool a_along_k = kKind != GroupedKind::outer;
  constexpr bool b_along_k = kKind == GroupedKind::matmul_b_transposed;
  const uint64_t a = hopper::descriptor<a_along_k, kPanelBytes>(
      ring.a() + uint32_t(warpgroup) * (64 * hopper::kRowBytes));  // 64 rows, or a panel
  const uint64_t b = hopper::descriptor<b_along_k, kPanelBytes>(ring.b());
#pragma unroll
  for (uint32_t step = 0; step < kDepth / 16; ++step)
    hopper::multiply_64_256_16<a_along_k, b_along_k>(
        sums, a + step * (hopper::bytes_of_16<a_along_k>() / 16),
        b + step * (hopper::bytes_of_16<b_along_k>() / 16), add || step > 0);
}

// Where the numbers of a lane's pieces of `positive` in a row are above 0: loaded all at once.
struct Masks {
  uint4 pieces[kCols / 32];
  bool any;

  template <class Walk>
  __device__ __forceinline__ Masks(const Walk& walk, int row) : any(walk.work.positive) {
    if (!any) return;
    const Real* from = walk.work.positive + (walk.row + int64_t(row)) * walk.work.positive_stride;
#pragma unroll
    for (int j = 0; j < kCols / 32; ++j) {
      const int col = (j * 4 + int(threadIdx.x) % 4) * 8, left = walk.cols() - col;
      pieces[j] = {0, 0, 0, 0};
      if (row >= walk.rows || left <= 0) continue;
      if (left >= 8) {
        pieces[j] = *reinterpret_cast<const uint4*>(from + walk.col + col);
      } else {
        uint32_t part[4] = {0, 0, 0, 0};
#pragma unroll
        for (int n = 0; n < 7; ++n)
          if (n < left)
            part[n / 2] |= uint32_t(__bfloat16_as_ushort(from[walk.col + col + n])) << (n % 2 * 16);
        pieces[j] = {part[0], part[1], part[2], part[3]};
      }
    }
  }
  __device__ __forceinline__ void apply(int j, uint32_t (&part)[4]) const {
    const uint32_t piece[4] = {pieces[j].x, pieces[j].y, pieces[j].z, pieces[j].w};
#pragma unroll
    for (int n = 0; n < 4; ++n)
      part[n] &= __hgt2_mask(*reinterpret_cast<const __nv_bfloat162*>(&piece[n]),
                             __float2bfloat162_rn(0.f));
  }
};

// A lane has two neighbours of a tile of 8 columns (hopper::multiply_64_256_16). Four tiles side by
// side are turned around among four lanes: each stores eight columns, 16 bytes, of one tile.
template <class Walk>
__device__ __forceinline__ void store(const Walk& walk, const float (&sums)[kSums], Real* out) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool relu = walk.work.relu;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp * 16 + half * 8 + lane / 4;
    Real* to_row = out + row * walk.work.out_stride;
    const Masks masks(walk, row);
#pragma unroll
    for (int j = 0; j < kCols / 8; j += 4) {
      uint32_t part[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int at = (j + n) * 4 + half * 2;
        __nv_bfloat162 pair = __floats2bfloat162_rn(sums[at], sums[at + 1]);
        if (relu) pair = __hmax2_nan(pair, __float2bfloat162_rn(0.f));
        part[n] = *reinterpret_cast<const uint32_t*>(&pair);
      }
      transpose_quad(part);
      const int col = (j + lane % 4) * 8;
      if (row >= walk.rows || col >= walk.cols()) continue;
      if (masks.any) masks.apply(j / 4, part);
      if (walk.work.wide_out && col + 8 <= walk.cols()) {
        *reinterpret_cast<uint4*>(to_row + col) = {part[0], part[1], part[2], part[3]};
      } else {
#pragma unroll
        for (int n = 0; n < 8; ++n)
          if (col + n < walk.cols())
            to_row[col + n] = __ushort_as_bfloat16((unsigned short)(part[n / 2] >> (n % 2 * 16)));
      }
    }
  }
}

// Four columns of f32 at `to`, of which `cols` are there (any number).
__device__ __forceinline__ void store_four(float* to, int cols, bool wide, bool add,
                                           const float4& old, const float (&four)[4]) {
  if (wide && cols >= 4) {
    float4 sum = {four[0], four[1], four[2], four[3]};
    if (add) sum = {old.x + sum.x, old.y + sum.y, old.z + sum.z, old.w + sum.w};
    *reinterpret_cast<float4*>(to) = sum;
  } else {
#pragma unroll
    for (int n = 0; n < 4; ++n)
      if (n < cols) to[n] = add ? to[n] + four[n] : four[n];
  }
}

// Two neighbouring lanes exchange halves of two tiles of 8 columns: the even one stores four
// columns of the first, the odd one of the second. Old numbers are read eight at a time ahead.
template <class Walk>
__device__ __forceinline__ void store(const Walk& walk, const float (&sums)[kSums], float* out) {
  constexpr int kBatch = 8;  // tiles: kBatch / 2 pairs of them, two rows each
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, odd = lane % 2;
  const bool wide = walk.work.wide_out, add = walk.work.accumulate;
  const int row = warp * 16 + lane / 4, lane_col = odd * 8 + (lane & 2) * 2;
#pragma unroll
  for (int j = 0; j < kCols / 8; j += kBatch) {
    float4 old[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = row + i % 2 * 8, col = (j + i / 2 * 2) * 8 + lane_col;
      old[i] = {0.f, 0.f, 0.f, 0.f};
      if (add && wide && at < walk.rows && col + 4 <= walk.cols())
        old[i] = *reinterpret_cast<const float4*>(out + at * walk.work.out_stride + col);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int tile = j + i / 2 * 2, half = i % 2;
      const float* left = sums + tile * 4 + half * 2;
      const float* right = left + 4;  // the next tile's
      const float x = __shfl_xor_sync(0xffffffffu, odd ? left[0] : right[0], 1);
      const float y = __shfl_xor_sync(0xffffffffu, odd ? left[1] : right[1], 1);
      const float four[4] = {odd ? x : left[0], odd ? y : left[1], odd ? right[0] : x,
                             odd ? right[1] : y};
      const int at = row + half * 8, col = tile * 8 + lane_col;
      if (at < walk.rows)
        store_four(out + at * walk.work.out_stride + col, walk.cols() - col, wide, add, old[i],
                   four);
    }
  }
}

// Multiplies what is in the stages. A stage is free when the products that read it are done, which
// is known one stage later. `memory` is where ring.memory says, for ordinary stores. What a tile
// needs beside, epilogue.begin(walk) loads before the products; end(walk, that, sums) stores it.
template <GroupedKind kKind, class Walk, class Epilogue>
__device__ __forceinline__ void consume(Walk walk, Ring ring, std::byte* memory, int warpgroup,
                                        const Epilogue& epilogue) {
  const bool arrives = threadIdx.x % 32 == 0;  // one lane for its warp
  float sums[kSums];
  for (; walk.more(); walk.next()) {
    const auto ahead = epilogue.begin(walk);
    const int stages = walk.stages();
    uint32_t last = 0;
    for (int s = 0; s < stages; ++s) {
      hopper::wait(ring.when_full(), ring.parity);
      if constexpr (kKind == GroupedKind::outer) {
        const int there = walk.K - s * kDepth;
        if (there < kDepth) clear_rows(memory + ring.stage * int(kStageBytes), there);
      }
      hopper::begin_products();
      multiply_stage<kKind>(sums, ring, warpgroup, s > 0);
      hopper::end_products();
      hopper::wait_products<1>();
      if (s > 0 && arrives) hopper::arrive(last);
      last = ring.when_empty();
      ring.next();
    }
    hopper::wait_products<0>();
    hopper::hold(sums);
    if (arrives) hopper::arrive(last);
    epilogue.end(walk, ahead, sums);
  }
}

struct Store {
  struct Nothing {};
  template <class Walk>
  __device__ __forceinline__ Nothing begin(const Walk&) const { return {}; }
  template <class Walk>
  __device__ __forceinline__ void end(const Walk& walk, Nothing, const float (&sums)[kSums]) const {
    store(walk, sums, walk.out());
  }
};

// Stages from the first border of a pattern in `memory` on. The block's barrier must follow before
// the ring is used.
__device__ __forceinline__ Ring start_ring(std::byte* memory, uint64_t (&barriers)[2 * kStages]) {
  const uint32_t start = hopper::shared_address(memory), skip = -start % hopper::kPatternBytes;
  const Ring ring{.memory = start + skip,
                  .full = hopper::shared_address(barriers),
                  .empty = hopper::shared_address(barriers + kStages)};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      hopper::init_barrier(ring.full + stage * 8, 1);
      hopper::init_barrier(ring.empty + stage * 8, kConsumers * 4);
    }
    hopper::publish_barriers();
  }
  return ring;
}
__device__ __forceinline__ std::byte* memory_of(const Ring& ring, std::byte* memory) {
  return memory + (ring.memory - hopper::shared_address(memory));
}

// Each warpgroup does its part.
template <GroupedKind kKind, class Walk, class Epilogue>
__device__ __forceinline__ void share_work(const CUtensorMap& a, const CUtensorMap& b,
                                           const Walk& walk, const Ring& ring, std::byte* memory,
                                           const Epilogue& epilogue) {
  const int warpgroup = __shfl_sync(0xffffffffu, int(threadIdx.x) / 128, 0);
  if (warpgroup == kConsumers) {
    hopper::give_registers<kProducerRegisters>();
    if (threadIdx.x / 32 == kProducerWarp) produce<kKind>(a, b, walk, ring);
  } else {
    hopper::take_registers<kConsumerRegisters>();
    consume<kKind>(walk, ring, memory_of(ring, memory), warpgroup, epilogue);
  }
}

inline size_t shared_bytes(int groups) {
  return hopper::kPatternBytes + size_t(kStages) * kStageBytes + size_t(groups + 1) * sizeof(int);
}

// One block per multiprocessor; block i computes tiles i, i + blocks ..., each alone and over K in
// order. A stage is 64 of K; four of them lie in shared memory and are filled by TMA, also while a
// tile is stored. Reads a tile's operands once (from L2, mostly) and stores out once. Bound by the
// tensor cores (128 cycles for each of the 8 wgmma of a stage) beside L2: 48 KiB in 1,024 cycles.
// Its body needs sm_90a; elsewhere there is none, and no static shared memory.
template <GroupedKind kKind, class Out>
__global__ void __launch_bounds__(kThreads, 1)
    multiply(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
             const __grid_constant__ GroupedWork<Real, Out> work) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) std::byte memory[];
  __shared__ __align__(8) uint64_t barriers[2 * kStages];
  const Ring ring = start_ring(memory, barriers);
  int* first = reinterpret_cast<int*>(memory_of(ring, memory) + kStages * kStageBytes);
  if constexpr (kKind != GroupedKind::outer)
    count_tiles<kThreads, kRows>(work.offsets, work.groups, work.rows, first);
  __syncthreads();
  share_work<kKind>(a, b, Walk<kKind, Out>(work, first), ring, memory, Store());
#endif
}

}  // namespace grouped_wgmma

}  // namespace moemamba
