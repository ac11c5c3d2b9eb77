#pragma once
#include <cmath>

#include "kernels/attention.h"
#include "kernels/cuda/packs.cuh"
#include "kernels/cuda/starts.cuh"
#include "kernels/gpu_limits.h"

namespace moemamba {  // what attention's two directions share

// A block of 16 x 16 threads has kRows own rows (queries or keys) for each row of threads, which
// it keeps in shared memory, and goes through tiles of kOthers rows of the other side. Products
// are f32 FMA: attention is a small share of a hybrid model's time. kWidth is dh rounded up to what
// was compiled; columns beyond dh are 0. Bounds of one block for a multiprocessor keep spills away.
constexpr int kAttentionThreads = 256;
constexpr int kOthers = 32;
constexpr int kPadding = 4;  // floats behind a row, so that 8 rows' 16-byte reads fall on 8 banks
constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

template <int kWidth>
constexpr int kTileStride = kWidth + kPadding;
constexpr int kWeightStride = kOthers + kPadding;

// Rows of one head: row r begins at data + r * stride.
template <class Real>
struct Head {
  Real* data;
  int64_t stride;
};

struct AttentionShape {
  int64_t L, filled, sequence_keys;  // rows of k from one sequence to the next
  int H, Hkv, dh;
  float scale;           // 1 / sqrt(dh)
  const int32_t* firsts;  // [T]: the first key that a token sees
};

template <class Op>
AttentionShape attention_shape(const Op& op, const int32_t* firsts) {
  const int64_t L = op.qkv.rows() / op.sequences;
  const int dh = int(op.qkv.cols() / (op.heads + 2 * op.kv_heads));
  return {.L = L,
          .filled = 0,
          .sequence_keys = L,
          .H = int(op.heads),
          .Hkv = int(op.kv_heads),
          .dh = dh,
          .scale = float(1 / std::sqrt(double(dh))),
          .firsts = firsts};
}

// Copies rows begin .. end of a head into a tile of kTile rows; rows and columns that do not exist
// become 0.
template <int kTile, int kWidth, class Real>
__device__ __forceinline__ void load_tile(Head<Real> head, int64_t begin, int64_t end, int dh,
                                          float* tile) {
#pragma unroll 4
  for (int i = threadIdx.x; i < kTile * kWidth; i += kAttentionThreads) {
    const int row = i / kWidth, d = i % kWidth;
    const bool exists = begin + row < end && d < dh;
    tile[row * kTileStride<kWidth> + d] =
        exists ? to_float(head.data[(begin + row) * head.stride + d]) : 0.f;
  }
}

// The thread's own rows are kRows * (threadIdx.x / 16) + r, its others threadIdx.x % 16 + 16 c.
template <int kRows>
__device__ __forceinline__ int own_row(int r) { return int(threadIdx.x) / 16 * kRows + r; }
__device__ __forceinline__ int other_row(int c) { return int(threadIdx.x) % 16 + 16 * c; }

// products[r][c] = own row r . other row c
template <int kRows, int kWidth>
__device__ __forceinline__ void multiply_rows(const float* own, const float* others,
                                              float (&products)[kRows][2]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) products[r][0] = products[r][1] = 0;
#pragma unroll 4
  for (int d = 0; d < kWidth; d += 4) {
    float4 b[2];
#pragma unroll
    for (int c = 0; c < 2; ++c)
      b[c] = *reinterpret_cast<const float4*>(others + other_row(c) * kTileStride<kWidth> + d);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float4 a =
          *reinterpret_cast<const float4*>(own + own_row<kRows>(r) * kTileStride<kWidth> + d);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        products[r][c] = fmaf(a.x, b[c].x, products[r][c]);
        products[r][c] = fmaf(a.y, b[c].y, products[r][c]);
        products[r][c] = fmaf(a.z, b[c].z, products[r][c]);
        products[r][c] = fmaf(a.w, b[c].w, products[r][c]);
      }
    }
  }
}

// What a thread sums up for its own rows: columns (16 j + threadIdx.x % 16) kPart + i of them.
template <int kRows, int kWidth>
struct RowSums {
  static constexpr int kPart = std::min(4, kWidth / 16), kParts = kWidth / 16 / kPart;
  float at[kRows][kParts][kPart];
  __device__ static int column(int part) {
    return (16 * part + int(threadIdx.x) % 16) * kPart;
  }
};

// sums += weights [own rows, kOthers] times others [kOthers, kWidth], others in their order. The
// weights of own rows were written by the same half warp.
template <int kRows, int kWidth>
__device__ __forceinline__ void add_product(const float* weights, const float* others,
                                            RowSums<kRows, kWidth>& sums) {
  using Sums = RowSums<kRows, kWidth>;
#pragma unroll 4
  for (int k = 0; k < kOthers; ++k) {
    float w[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) w[r] = weights[own_row<kRows>(r) * kWeightStride + k];
#pragma unroll
    for (int p = 0; p < Sums::kParts; ++p) {
      const auto b = *reinterpret_cast<const Pack<float, Sums::kPart>*>(
          others + k * kTileStride<kWidth> + Sums::column(p));
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int i = 0; i < Sums::kPart; ++i)
          sums.at[r][p][i] = fmaf(w[r], b.at[i], sums.at[r][p][i]);
    }
  }
}

template <int kRows>
__device__ __forceinline__ void write_weights(const float (&values)[kRows][2], float* weights) {
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int c = 0; c < 2; ++c)
      weights[own_row<kRows>(r) * kWeightStride + other_row(c)] = values[r][c];
}

template <int kRows, int kWidth>
__device__ __forceinline__ void clear(RowSums<kRows, kWidth>& sums) {
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int p = 0; p < sums.kParts; ++p)
#pragma unroll
      for (int i = 0; i < sums.kPart; ++i) sums.at[r][p][i] = 0;
}

// Writes the sums, row r of them times factor[r], to the rows begin .. end of a head.
template <int kRows, int kWidth, class Real>
__device__ __forceinline__ void write_rows(const RowSums<kRows, kWidth>& sums,
                                           const float (&factor)[kRows], Head<Real> head,
                                           int64_t begin, int64_t end, int dh) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = begin + own_row<kRows>(r);
    if (row >= end) continue;
#pragma unroll
    for (int p = 0; p < sums.kParts; ++p)
#pragma unroll
      for (int i = 0; i < sums.kPart; ++i) {
        const int d = sums.column(p) + i;
        if (d < dh)
          head.data[row * head.stride + d] = from_float<Real>(sums.at[r][p][i] * factor[r]);
      }
  }
}

// Calls fn.operator()<kWidth>() for the least compiled width that holds dh.
template <class Fn>
void visit_width(int64_t dh, Fn&& fn) {
  check(dh <= kWidestHeadOnGpu, "attention: a GPU takes heads of up to ", kWidestHeadOnGpu,
        " columns, found ", dh, "; use more heads or --device=cpu");
  if (dh <= 32) return fn.template operator()<32>();
  if (dh <= 64) return fn.template operator()<64>();
  if (dh <= 128) return fn.template operator()<128>();
  static_assert(kWidestHeadOnGpu == 256);
  fn.template operator()<256>();
}

// Launches with more shared memory than a kernel gets unasked.
template <class Kernel, class Arguments>
void launch_attention(Stream& stream, Kernel kernel, int64_t blocks, size_t shared,
                      const Arguments& arguments) {
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)),
             "attention");
  kernel<<<grid_of(blocks), kAttentionThreads, shared, native(stream)>>>(arguments);
  cuda_check(cudaGetLastError(), "attention");
}

}  // namespace moemamba
