#pragma once
#include <algorithm>

#include "core/device.h"

namespace moemamba {

// c = op(a) op(b) (+ c) on row-major f32: op(a)[M, K], op(b)[K, N], c[M, N].
struct Gemm {
  const float* a = nullptr;
  int64_t a_stride = 0;
  const float* b = nullptr;
  int64_t b_stride = 0;
  float* c = nullptr;
  int64_t c_stride = 0;
  int64_t M = 0, N = 0, K = 0;
  bool a_transposed = false, b_transposed = false, accumulate = false;

  // The same product for part of op(a)'s rows, op(b)'s columns, or of the sum over K.
  Gemm rows(int64_t begin, int64_t end) const;
  Gemm columns(int64_t begin, int64_t end) const;
  Gemm block(int64_t begin, int64_t end) const;
};

// One single-threaded BLAS call. K = 0 writes zeros (or adds nothing).
void multiply(const Gemm& gemm);

// `extent` cut into `count` even parts on multiples of 16; the last ones may be empty.
struct Cut {
  int64_t extent, count, size;
  Cut(int64_t extent, int64_t count)
      : extent(extent), count(count), size(((extent + count - 1) / count + 15) / 16 * 16) {}
  int64_t begin(int64_t i) const { return std::min(extent, i * size); }
  int64_t end(int64_t i) const { return begin(i + 1); }
};

// Tiles of M x N, big enough that a BLAS call keeps about 90 % of its speed on large matrices (a
// tile packs its share of a and b again; those of a transposed a must be taller for that). A
// function of the shape alone.
struct Tiling {
  Cut rows, columns;
  static constexpr int64_t kRows = 256, kTransposedRows = 1024, kColumns = 1024;
  Tiling(int64_t M, int64_t N, int64_t row_limit)
      : rows(M, std::max<int64_t>(1, (M + row_limit - 1) / row_limit)),
        columns(N, std::max<int64_t>(1, (N + kColumns - 1) / kColumns)) {}
  explicit Tiling(const Gemm& gemm)
      : Tiling(gemm.M, gemm.N, gemm.a_transposed ? kTransposedRows : kRows) {}
  int64_t count() const { return rows.count * columns.count; }
  // Neighbouring tiles share a's rows.
  Gemm tile(const Gemm& gemm, int64_t i) const {
    const int64_t r = i / columns.count, c = i % columns.count;
    return gemm.rows(rows.begin(r), rows.end(r)).columns(columns.begin(c), columns.end(c));
  }
};

// Tile by tile over the stream's threads; uses no workspace.
void multiply_tiles(Stream& stream, const Gemm& gemm);

}  // namespace moemamba
