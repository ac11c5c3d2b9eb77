#pragma once
#include <type_traits>

#include "kernels/cuda/common.cuh"

namespace moemamba {

// Which rows of b[e] run along its columns; outer: a and b are both cut along their rows.
enum class GroupedKind { matmul, matmul_b_transposed, outer };

// A grouped product as its kernels take it. The groups' ends are on the device alone.
//   matmul:  out[rows of e, N] = a[rows of e, K] op(b[e])
//   outer:   out[e][M, N] (+)= a[rows of e, M]' b[rows of e, N]
template <class Real, class Out>
struct GroupedWork {
  const Real* a;
  const Real* b;
  Out* out;
  const int32_t* offsets;  // [groups + 1]
  int64_t a_stride, b_stride, out_stride;
  int groups, rows;  // rows: of a, so at least offsets[groups]
  int M, N, K;       // M: of outer; K: of matmul. The others come from offsets
  bool accumulate;
  bool wide_out;  // out and its rows lie on borders of what an epilogue stores at once
  // Of wgmma's kernels alone: relu, or its gradient, of the product (GroupedMatmul).
  bool relu = false;
  const Real* positive = nullptr;  // [rows, N]; null: none. Rows on 16-byte borders
  int64_t positive_stride = 0;
};

// One tile of out, of at most kRows x kCols, and where its operands begin. Operand rows run along
// K, or across it where a_along_k, b_along_k are false.
template <class Real, class Out>
struct GroupedTile {
  const Real* a;
  const Real* b;
  Out* out;
  int rows, cols;  // that out has left from here; may exceed a tile
  int K;
};

// A group's first row and number of rows. Whoever wrote the offsets wrongly must not make us write
// elsewhere.
__device__ __forceinline__ int2 group_rows(const int32_t* offsets, int group, int rows) {
  const int begin = min(max(offsets[group], 0), rows);
  return {begin, min(max(offsets[group + 1], begin), rows) - begin};
}

// Writes to first[e] how many tiles of kTileRows rows the groups before e have, to first[groups]
// how many there are. Called by all kThreads threads of a block; ends with a barrier.
template <int kThreads, int kTileRows>
__device__ void count_tiles(const int32_t* offsets, int groups, int rows, int* first) {
  __shared__ int warps[kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int share = (groups + kThreads - 1) / kThreads;
  const int begin = min(int(threadIdx.x) * share, groups), end = min(begin + share, groups);
  const auto tiles_of = [&](int e) {
    return (group_rows(offsets, e, rows).y + kTileRows - 1) / kTileRows;
  };
  int mine = 0;
  for (int e = begin; e < end; ++e) mine += tiles_of(e);
  int sum = mine;  // of the lanes up to this one
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  int before = sum - mine;
  for (int w = 0; w < warp; ++w) before += warps[w];
  for (int e = begin; e < end; ++e) {
    first[e] = before;
    before += tiles_of(e);
  }
  if (threadIdx.x == kThreads - 1) first[groups] = before;  // its share ends last, if it has one
  __syncthreads();
}

// Turns a 4 x 4 square around among four neighbouring lanes: lane q gets what the lanes 0 .. 3 had
// as their part[q].
__device__ __forceinline__ void transpose_quad(uint32_t (&part)[4]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? part[i] : part[i + 1], 1);
    (odd ? part[i] : part[i + 1]) = got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? part[i] : part[i + 2], 2);
    (upper ? part[i] : part[i + 2]) = got;
  }
}

// The tiles of a grouped product, numbered: group after group, in each row of tiles after row.
template <GroupedKind kKind, class Real, class Out, int kRows, int kCols>
struct GroupedTiles {
  using Tile = GroupedTile<Real, Out>;
  static constexpr bool outer = kKind == GroupedKind::outer;
  static constexpr bool a_along_k = !outer;
  static constexpr bool b_along_k = kKind == GroupedKind::matmul_b_transposed;

  GroupedWork<Real, Out> work;
  const int* first;  // of matmul: count_tiles's result
  int across;        // tiles beside each other in N

  __device__ int count() const {
    if constexpr (outer)
      return work.groups * ((work.M + kRows - 1) / kRows) * across;
    else
      return first[work.groups] * across;
  }

  __device__ Tile at(int index) const {
    const int col = index % across * kCols;
    index /= across;
    if constexpr (outer) {
      const int down = (work.M + kRows - 1) / kRows;
      const int e = index / down, row = index % down * kRows;
      const int2 group = group_rows(work.offsets, e, work.rows);
      return {.a = work.a + group.x * work.a_stride + row,
              .b = work.b + group.x * work.b_stride + col,
              .out = work.out + (int64_t(e) * work.M + row) * work.out_stride + col,
              .rows = work.M - row,
              .cols = work.N - col,
              .K = group.y};
    } else {
      const int e = group_of(index), row = (index - first[e]) * kRows;
      const int2 group = group_rows(work.offsets, e, work.rows);
      const int64_t from = int64_t(group.x) + row;
      const Real* b = b_along_k ? work.b + (int64_t(e) * work.N + col) * work.b_stride
                                : work.b + int64_t(e) * work.K * work.b_stride + col;
      return {.a = work.a + from * work.a_stride,
              .b = b,
              .out = work.out + from * work.out_stride + col,
              .rows = group.y - row,
              .cols = work.N - col,
              .K = work.K};
    }
  }

  // The last group that begins at or before a row of tiles: the one group that holds it, since
  // empty groups before it begin there too.
  __device__ int group_of(int row_of_tiles) const {
    int low = 0, high = work.groups;  // first[low] <= row_of_tiles < first[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first[middle] <= row_of_tiles) low = middle;
      else high = middle;
    }
    return low;
  }
};

}  // namespace moemamba
