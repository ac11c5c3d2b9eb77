#pragma once
#include "kernels/cuda/grouped_tiles.cuh"

namespace moemamba {

// Grouped products of f32, exact: no TF32.
namespace grouped_simt {

constexpr int kThreads = 256, kTile = 128, kDepth = 16;
constexpr int kPitch = kTile + 4;  // floats of a row in shared memory: 16-byte borders, other banks

// Brings kTile (of M or N) x kDepth (of K) elements to to[k][at], zeros where there are fewer.
template <bool kAlongK>
__device__ __forceinline__ void bring(float (&to)[kDepth][kPitch], const float* from,
                                      int64_t stride, int extent, int K) {
#pragma unroll 4  // more of them at once would not leave room for the sums
  for (int i = 0; i < kTile * kDepth / kThreads; ++i) {
    const int index = i * kThreads + int(threadIdx.x);
    const int k = kAlongK ? index % kDepth : index / kTile;
    const int at = kAlongK ? index / kDepth : index % kTile;
    const bool there = at < extent && k < K;
    to[k][at] = there ? from[kAlongK ? at * stride + k : k * stride + at] : 0.f;
  }
}

// A thread's 8 x 8 numbers of a tile are four squares of 4 x 4, 64 rows or columns apart.
__device__ __forceinline__ int place(int part, int i) { return part * 4 + (i / 4) * 64 + i % 4; }

__device__ __forceinline__ void multiply_stage(float (&acc)[8][8], const float (&a)[kDepth][kPitch],
                                               const float (&b)[kDepth][kPitch], int down,
                                               int across) {
#pragma unroll 4
  for (int k = 0; k < kDepth; ++k) {
    float x[8], y[8];
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      *reinterpret_cast<float4*>(x + i) = *reinterpret_cast<const float4*>(&a[k][place(down, i)]);
      *reinterpret_cast<float4*>(y + i) =
          *reinterpret_cast<const float4*>(&b[k][place(across, i)]);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) acc[i][j] = fmaf(x[i], y[j], acc[i][j]);
  }
}

// Blocks take tiles of 128 x 128 in turns, each thread 8 x 8 numbers of one. Reads each operand
// once a tile, 16 of K at a time. Bound by FFMA: 64 of them for every 4 loads from shared memory.
template <GroupedKind kKind>
__global__ void __launch_bounds__(kThreads, 2) multiply(GroupedWork<float, float> work) {
  using Tiles = GroupedTiles<kKind, float, float, kTile, kTile>;
  extern __shared__ int first[];
  __shared__ __align__(16) float a[kDepth][kPitch], b[kDepth][kPitch];
  if constexpr (!Tiles::outer)
    count_tiles<kThreads, kTile>(work.offsets, work.groups, work.rows, first);
  const Tiles tiles{work, first, (work.N + kTile - 1) / kTile};
  const int count = tiles.count(), down = threadIdx.x / 16, across = threadIdx.x % 16;
  for (int index = blockIdx.x; index < count; index += gridDim.x) {
    const auto tile = tiles.at(index);
    float acc[8][8] = {};
    for (int k = 0; k < tile.K; k += kDepth) {
      __syncthreads();  // the last stage has been read
      bring<Tiles::a_along_k>(a, tile.a + (Tiles::a_along_k ? k : k * work.a_stride),
                              work.a_stride, tile.rows, tile.K - k);
      bring<Tiles::b_along_k>(b, tile.b + (Tiles::b_along_k ? k : k * work.b_stride),
                              work.b_stride, tile.cols, tile.K - k);
      __syncthreads();
      multiply_stage(acc, a, b, down, across);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int row = place(down, i), col = place(across, j);
        if (row >= tile.rows || col >= tile.cols) continue;
        float* to = tile.out + row * work.out_stride + col;
        *to = work.accumulate ? *to + acc[i][j] : acc[i][j];
      }
  }
}

}  // namespace grouped_simt

}  // namespace moemamba
