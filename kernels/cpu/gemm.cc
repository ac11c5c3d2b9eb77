#include "kernels/cpu/gemm.h"

#include <cblas.h>

namespace moemamba {

Gemm Gemm::rows(int64_t begin, int64_t end) const {
  Gemm part = *this;
  part.a += a_transposed ? begin : begin * a_stride;
  part.c += begin * c_stride;
  part.M = end - begin;
  return part;
}

Gemm Gemm::columns(int64_t begin, int64_t end) const {
  Gemm part = *this;
  part.b += b_transposed ? begin * b_stride : begin;
  part.c += begin;
  part.N = end - begin;
  return part;
}

Gemm Gemm::block(int64_t begin, int64_t end) const {
  Gemm part = *this;
  part.a += a_transposed ? begin * a_stride : begin;
  part.b += b_transposed ? begin : begin * b_stride;
  part.K = end - begin;
  return part;
}

void multiply(const Gemm& g) {
  // OpenBLAS' own threads would split sums by their number; ours share tiles instead.
  static const bool single = (openblas_set_num_threads(1), true);
  (void)single;
  if (g.M == 0 || g.N == 0) return;
  if (g.K == 0) {
    if (g.accumulate) return;
    for (int64_t m = 0; m < g.M; ++m) std::fill_n(g.c + m * g.c_stride, g.N, 0.f);
    return;
  }
  cblas_sgemm(CblasRowMajor, g.a_transposed ? CblasTrans : CblasNoTrans,
              g.b_transposed ? CblasTrans : CblasNoTrans, blasint(g.M), blasint(g.N), blasint(g.K),
              1.f, g.a, blasint(g.a_stride), g.b, blasint(g.b_stride), g.accumulate ? 1.f : 0.f,
              g.c, blasint(g.c_stride));
}

void multiply_tiles(Stream& stream, const Gemm& gemm) {
  if (gemm.M == 0 || gemm.N == 0) return;
  Tiling tiling(gemm);
  if (tiling.count() < 4)
    tiling = Tiling(gemm.M, gemm.N, gemm.a_transposed ? Tiling::kRows : Tiling::kRows / 2);
  stream.parallel_for(tiling.count(), [&](int64_t i) { multiply(tiling.tile(gemm, i)); });
}

}  // namespace moemamba
