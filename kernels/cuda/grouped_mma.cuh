#pragma once
#include "kernels/cuda/grouped_tiles.cuh"

namespace moemamba {

// Grouped products of bf16 by mma.sync (sm_80 and later).
namespace grouped_mma {

using Real = __nv_bfloat16;

constexpr int kThreads = 256, kRows = 128, kCols = 256, kDepth = 64, kStages = 3;
constexpr int kStageBytes = (kRows + kCols) * kDepth * int(sizeof(Real));  // 48 KiB
// A warp computes 64 x 64: 4 by 8 tiles of m16n8k16; the warps stand 2 by 4.
constexpr int kWarpRows = 64, kWarpCols = 64, kDown = kWarpRows / 16, kAcross = kWarpCols / 8;

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}
// Copies the first `bytes` of 16, and clears the rest; of none, does not read `from`.
__device__ __forceinline__ void copy_16(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void end_stage() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wait_stages() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of bf16, of which lane 8 i + r names row r of matrix i.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t address) {
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Brings kHeight rows of kWidth elements into shared memory, zeros where the source has fewer. A
// row's pieces of 16 bytes lie at (piece ^ row % 8), so that eight rows of one piece meet all 32
// banks. Unaligned sources go through registers, element by element.
template <int kHeight, int kWidth, bool kAligned>
__device__ __forceinline__ void bring(std::byte* to, const Real* from, int64_t stride, int rows,
                                      int cols) {
  constexpr int kPieces = kWidth / 8, kTimes = kHeight * kPieces / kThreads;
#pragma unroll (kAligned ? kTimes : 1)
  for (int i = 0; i < kTimes; ++i) {
    const int index = i * kThreads + int(threadIdx.x);
    const int row = index / kPieces, piece = index % kPieces;
    const int count = row < rows ? min(max(cols - piece * 8, 0), 8) : 0;  // of elements
    std::byte* place = to + (row * kPieces + (piece ^ (row & 7))) * 16;
    const Real* source = from + (count > 0 ? row * stride + piece * 8 : 0);
    if constexpr (kAligned) {
      copy_16(shared_address(place), source, count * int(sizeof(Real)));
    } else {
      Pack<Real> pack;
#pragma unroll
      for (int j = 0; j < 8; ++j) pack.at[j] = j < count ? source[j] : Real(0.f);
      *reinterpret_cast<Pack<Real>*>(place) = pack;
    }
  }
}

// Address of what a lane names to load_matrices, for 16 (of M or N) x 16 (of K) elements from
// (at, k) on. The four matrices stand M or N first where `kAtFirst` (a: its fragment), else K first
// (b: two columns of tiles).
template <int kExtent, bool kAlongK, bool kAtFirst>
__device__ __forceinline__ uint32_t matrices_address(uint32_t base, int at, int k) {
  const int lane = threadIdx.x % 32, row = lane % 8;
  const int near = lane / 8 % 2, far = lane / 16;
  const int in_at = kAtFirst ? near : far, in_k = kAtFirst ? far : near;
  if constexpr (kAlongK) {
    const int piece = k / 8 + in_k;
    return base + uint32_t((at + in_at * 8 + row) * (kDepth / 8) + (piece ^ row)) * 16;
  } else {
    const int piece = at / 8 + in_at;
    return base + uint32_t((k + in_k * 8 + row) * (kExtent / 8) + (piece ^ row)) * 16;
  }
}

// acc += the stage's product, for this warp's part of the tile.
template <class Tiles>
__device__ __forceinline__ void multiply_stage(float (&acc)[kDown][kAcross][4], uint32_t stage) {
  const int warp = threadIdx.x / 32, row = warp / 4 * kWarpRows, col = warp % 4 * kWarpCols;
  const uint32_t b_stage = stage + kRows * kDepth * uint32_t(sizeof(Real));
  uint32_t a[2][kDown][4], b[2][kAcross / 2][4];
  const auto load = [&](int slot, int k) {
#pragma unroll
    for (int i = 0; i < kDown; ++i)
      load_matrices<!Tiles::a_along_k>(
          a[slot][i], matrices_address<kRows, Tiles::a_along_k, true>(stage, row + i * 16, k));
#pragma unroll
    for (int j = 0; j < kAcross / 2; ++j)
      load_matrices<!Tiles::b_along_k>(
          b[slot][j], matrices_address<kCols, Tiles::b_along_k, false>(b_stage, col + j * 16, k));
  };
  load(0, 0);
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
    const int slot = step % 2;
    if (step + 1 < kDepth / 16) load(1 - slot, (step + 1) * 16);  // while this step multiplies
#pragma unroll
    for (int i = 0; i < kDown; ++i)
#pragma unroll
      for (int j = 0; j < kAcross; ++j)
        mma(acc[i][j], a[slot][i], b[slot][j / 2][j % 2 * 2], b[slot][j / 2][j % 2 * 2 + 1]);
  }
}

// Walks all stages of all tiles of this block, ahead of the products: a tile's first stages are
// under way while the one before is stored.
template <class Tiles, bool kAligned>
struct Loader {
  const Tiles& tiles;
  int tile_index, count;
  typename Tiles::Tile tile;
  int k = 0;

  __device__ Loader(const Tiles& all, int count)
      : tiles(all), tile_index(blockIdx.x), count(count), tile{} {
    if (tile_index < count) tile = tiles.at(tile_index);
  }
  __device__ __forceinline__ void bring_next(std::byte* stage) {
    while (tile_index < count && k >= tile.K) {
      tile_index += gridDim.x;
      k = 0;
      if (tile_index < count) tile = tiles.at(tile_index);
    }
    if (tile_index < count) {
      const GroupedWork<Real, std::remove_pointer_t<decltype(tile.out)>>& work = tiles.work;
      std::byte* b_stage = stage + kRows * kDepth * sizeof(Real);
      if constexpr (Tiles::a_along_k)
        bring<kRows, kDepth, kAligned>(stage, tile.a + k, work.a_stride, tile.rows, tile.K - k);
      else
        bring<kDepth, kRows, kAligned>(stage, tile.a + k * work.a_stride, work.a_stride,
                                       tile.K - k, tile.rows);
      if constexpr (Tiles::b_along_k)
        bring<kCols, kDepth, kAligned>(b_stage, tile.b + k, work.b_stride, tile.cols, tile.K - k);
      else
        bring<kDepth, kCols, kAligned>(b_stage, tile.b + k * work.b_stride, work.b_stride,
                                       tile.K - k, tile.cols);
      k += kDepth;
    }
    end_stage();
  }
};

// A lane of m16n8k16 holds columns 2 q, 2 q + 1 of rows g and g + 8 (lane = 4 g + q). Four tiles
// side by side are turned around, so that it stores eight columns of one tile: 16 bytes.
__device__ __forceinline__ void store(const GroupedWork<Real, Real>& work,
                                      const GroupedTile<Real, Real>& tile,
                                      const float (&acc)[kDown][kAcross][4]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kDown; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < kAcross; j += 4) {
        uint32_t part[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const __nv_bfloat162 pair = __floats2bfloat162_rn(acc[i][j + n][half * 2],
                                                            acc[i][j + n][half * 2 + 1]);
          part[n] = *reinterpret_cast<const uint32_t*>(&pair);
        }
        transpose_quad(part);
        const int row = warp / 4 * kWarpRows + i * 16 + half * 8 + lane / 4;
        const int col = warp % 4 * kWarpCols + (j + lane % 4) * 8;
        if (row >= tile.rows || col >= tile.cols) continue;
        Real* to = tile.out + row * work.out_stride + col;
        if (work.wide_out && col + 8 <= tile.cols) {
          *reinterpret_cast<uint4*>(to) = {part[0], part[1], part[2], part[3]};
        } else {
#pragma unroll
          for (int n = 0; n < 8; ++n)
            if (col + n < tile.cols)
              to[n] = __ushort_as_bfloat16((unsigned short)(part[n / 2] >> (n % 2 * 16)));
        }
      }
}

// Two columns at once: four lanes fill a sector of 32 bytes.
__device__ __forceinline__ void store(const GroupedWork<Real, float>& work,
                                      const GroupedTile<Real, float>& tile,
                                      const float (&acc)[kDown][kAcross][4]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kDown; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        const int row = warp / 4 * kWarpRows + i * 16 + half * 8 + lane / 4;
        const int col = warp % 4 * kWarpCols + j * 8 + lane % 4 * 2;
        if (row >= tile.rows || col >= tile.cols) continue;
        float* to = tile.out + row * work.out_stride + col;
        float2 sum = {acc[i][j][half * 2], acc[i][j][half * 2 + 1]};
        if (work.wide_out && col + 2 <= tile.cols) {
          auto* pair = reinterpret_cast<float2*>(to);
          if (work.accumulate) sum = {sum.x + pair->x, sum.y + pair->y};
          *pair = sum;
        } else {
          to[0] = work.accumulate ? to[0] + sum.x : sum.x;
          if (col + 1 < tile.cols) to[1] = work.accumulate ? to[1] + sum.y : sum.y;
        }
      }
}

inline size_t shared_bytes(int groups) {
  return size_t(kStages) * kStageBytes + size_t(groups + 1) * sizeof(int);
}

// One block per multiprocessor; block i computes tiles i, i + blocks ..., each alone and over K in
// order. Three stages of 64 along K lie in shared memory, filled by cp.async two ahead. Reads a
// tile's operands once (from L2, mostly) and stores out once. Bound by the tensor cores' mma.sync
// rate (about 0.62 of wgmma's) beside shared memory's: per 16 of K, 12 KiB come in, 32 KiB go out.
template <GroupedKind kKind, class Out, bool kAligned>
__global__ void __launch_bounds__(kThreads, 1) multiply(GroupedWork<Real, Out> work) {
  using Tiles = GroupedTiles<kKind, Real, Out, kRows, kCols>;
  extern __shared__ __align__(128) std::byte memory[];
  int* first = reinterpret_cast<int*>(memory + kStages * kStageBytes);
  if constexpr (!Tiles::outer)
    count_tiles<kThreads, kRows>(work.offsets, work.groups, work.rows, first);
  const Tiles tiles{work, first, (work.N + kCols - 1) / kCols};
  const int count = tiles.count();
  Loader<Tiles, kAligned> loader(tiles, count);
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage)
    loader.bring_next(memory + stage * kStageBytes);
  int stage = 0, freed = kStages - 1;  // freed: the one that the last step has read
  for (int index = blockIdx.x; index < count; index += gridDim.x) {
    const auto tile = tiles.at(index);
    float acc[kDown][kAcross][4] = {};
    for (int k = 0; k < tile.K; k += kDepth) {
      wait_stages<kStages - 2>();
      __syncthreads();
      loader.bring_next(memory + freed * kStageBytes);
      multiply_stage<Tiles>(acc, shared_address(memory + stage * kStageBytes));
      freed = stage;
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    if (tile.K > 0 || Tiles::a_along_k || !work.accumulate) store(work, tile, acc);
  }
}

}  // namespace grouped_mma

}  // namespace moemamba
