#include "kernels/matmul.h"

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/simd/rows.h"
#include "kernels/pointwise.h"

namespace moemamba {

namespace {

// Products with fewer tiles than this and a long K (weight gradients: K counts tokens) are also cut
// along K, into partial sums that are added in order.
constexpr int64_t kFewTiles = 8;
constexpr int64_t kBlock = 1024;

int64_t blocks_of(int64_t tiles, int64_t K) {
  return std::clamp<int64_t>(kFewTiles / tiles, 1, std::max<int64_t>(1, K / kBlock));
}

// Block 0 goes to c, the others to the workspace, which c then gathers row by row.
void multiply_blocks(Stream& stream, const Gemm& gemm, const Tiling& tiling, int64_t blocks) {
  const Cut cut(gemm.K, blocks);
  const int64_t stride = (gemm.N + 15) / 16 * 16, size = gemm.M * stride;
  auto* partial = reinterpret_cast<float*>(
      stream.workspace(size_t((blocks - 1) * size) * sizeof(float)));
  stream.parallel_for(blocks * tiling.count(), [&](int64_t i) {
    const int64_t block = i / tiling.count();
    Gemm part = gemm.block(cut.begin(block), cut.end(block));
    if (block > 0) {
      part.c = partial + (block - 1) * size;
      part.c_stride = stride;
      part.accumulate = false;
    }
    multiply(tiling.tile(part, i % tiling.count()));
  });
  const RowKernels& rows = row_kernels(simd_level());
  const Cut row_cut(gemm.M, std::min<int64_t>(kFewTiles, gemm.M));
  stream.parallel_for(row_cut.count, [&](int64_t i) {
    for (int64_t m = row_cut.begin(i); m < row_cut.end(i); ++m)
      for (int64_t block = 1; block < blocks; ++block)
        rows.add(gemm.c + m * gemm.c_stride, partial + (block - 1) * size + m * stride, gemm.N);
  });
}

// Group ends as the router wrote them; whoever wrote them wrongly must not make us write elsewhere.
void check_offsets(const char* name, const Tensor& offsets, int64_t rows) {
  const auto* at = offsets.as<int32_t>();
  const int64_t groups = offsets.cols() - 1;
  check(at[0] == 0, name, ": offsets must start at 0, found ", at[0]);
  for (int64_t e = 0; e < groups; ++e)
    check(at[e] <= at[e + 1], name, ": offsets must ascend, found ", at[e], " then ", at[e + 1],
          " at group ", e);
  check(at[groups] <= rows, name, ": offsets end at ", at[groups], " but there are ", rows,
        " rows");
}

void expect_blas_sizes(const char* name, std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* tensor : tensors) {
    check(tensor->dtype == DType::f32, name, " on the CPU takes f32, found ",
          name_of(tensor->dtype));
    check(tensor->stride <= INT32_MAX && tensor->rows() <= INT32_MAX, name,
          ": rows and row strides must be below 2^31, found ", to_string(tensor->shape));
  }
}

int64_t stride_of(const Tensor& tensor) {
  return std::max<int64_t>({1, tensor.stride, tensor.cols()});
}

}  // namespace

void Matmul::check() const {
  const auto [a_rows, a_cols] = dims<2>("a[M, K]", a);
  const auto [b_rows, b_cols] = dims<2>("b[K, N]", b);
  const int64_t M = a_transposed ? a_cols : a_rows, K = a_transposed ? a_rows : a_cols;
  const int64_t N = b_transposed ? b_rows : b_cols;
  expect("b[K, N]", b, b_transposed ? Shape{N, K} : Shape{K, N}, b.dtype);
  expect("out[M, N]", out, {M, N}, out.dtype);
  expect_real("a[M, K]", a);
  expect_real("b[K, N]", b);
  expect_real("out[M, N]", out);
}

void run_cpu(Stream& stream, const Matmul& op) {
  expect_blas_sizes(op.name, {&op.a, &op.b, &op.out});
  const Gemm gemm{.a = op.a.as<float>(),
                  .a_stride = stride_of(op.a),
                  .b = op.b.as<float>(),
                  .b_stride = stride_of(op.b),
                  .c = op.out.as<float>(),
                  .c_stride = stride_of(op.out),
                  .M = op.out.rows(),
                  .N = op.out.cols(),
                  .K = op.a_transposed ? op.a.rows() : op.a.cols(),
                  .a_transposed = op.a_transposed,
                  .b_transposed = op.b_transposed,
                  .accumulate = op.accumulate};
  if (gemm.M == 0 || gemm.N == 0) return;
  const Tiling tiling(gemm);
  const int64_t blocks = blocks_of(tiling.count(), gemm.K);
  if (blocks > 1) return multiply_blocks(stream, gemm, tiling, blocks);
  multiply_tiles(stream, gemm);
}

void GroupedMatmul::check() const {
  const auto [R, K] = dims<2>("a[R, K]", a);
  const auto [E, b_rows, b_cols] = dims<3>("b[E, K, N]", b);
  const int64_t N = b_transposed ? b_rows : b_cols;
  expect_real("a[R, K]", a);
  expect("b[E, K, N]", b, b_transposed ? Shape{E, N, K} : Shape{E, K, N}, a.dtype);
  expect("offsets[E + 1]", offsets, {E + 1}, DType::i32);
  expect("out[R, N]", out, {R, N}, a.dtype);
  if (positive) expect("positive[R, N]", positive, {R, N}, a.dtype);
}

Tensor grouped_rows(const Tensor& offsets) {
  return view(offsets.row<int32_t>(0) + offsets.cols() - 1, {1}, DType::i32, offsets.device);
}

void run_cpu(Stream& stream, const GroupedMatmul& op) {
  expect_blas_sizes(op.name, {&op.a, &op.b, &op.out});
  check_offsets(op.name, op.offsets, op.a.rows());
  const auto* offsets = op.offsets.as<int32_t>();
  const int64_t E = op.b.shape[0], N = op.out.cols();
  if (N == 0) return;
  const auto tiling_of = [&](int64_t e) {
    return Tiling(offsets[e + 1] - offsets[e], N, Tiling::kRows);
  };
  int64_t tiles = 0;
  for (int64_t e = 0; e < E; ++e) tiles += tiling_of(e).count();
  stream.parallel_for(tiles, [&](int64_t i) {
    int64_t e = 0;
    while (i >= tiling_of(e).count()) i -= tiling_of(e++).count();
    const Gemm gemm{.a = op.a.row<float>(offsets[e]),
                    .a_stride = stride_of(op.a),
                    .b = op.b.row<float>(e * op.b.shape[1]),
                    .b_stride = stride_of(op.b),
                    .c = op.out.row<float>(offsets[e]),
                    .c_stride = stride_of(op.out),
                    .M = offsets[e + 1] - offsets[e],
                    .N = N,
                    .K = op.a.cols(),
                    .b_transposed = op.b_transposed};
    multiply(tiling_of(e).tile(gemm, i));
  });
  const Tensor rows = grouped_rows(op.offsets);
  if (op.relu) run_cpu(stream, ActivationForward{.x = op.out, .rows = rows, .y = op.out});
  if (op.positive)
    run_cpu(stream,
            ActivationBackward{.x = op.positive, .dy = op.out, .rows = rows, .dx = op.out});
}

void GroupedOuter::check() const {
  const auto [R, M] = dims<2>("a[R, M]", a);
  const auto [E, out_rows, out_cols] = dims<3>("out[E, M, N]", out);
  const auto [b_rows, N] = dims<2>("b[R, N]", b);
  expect_real("a[R, M]", a);
  expect("b[R, N]", b, {R, N}, a.dtype);
  expect("offsets[E + 1]", offsets, {E + 1}, DType::i32);
  expect("out[E, M, N]", out, {E, M, N});
}

void run_cpu(Stream& stream, const GroupedOuter& op) {
  expect_blas_sizes(op.name, {&op.a, &op.b, &op.out});
  check_offsets(op.name, op.offsets, op.a.rows());
  const auto* offsets = op.offsets.as<int32_t>();
  const int64_t E = op.out.shape[0], M = op.out.shape[1], N = op.out.shape[2];
  if (M == 0 || N == 0) return;
  const Tiling tiling(M, N, E < kFewTiles / 2 ? Tiling::kRows : Tiling::kTransposedRows);
  stream.parallel_for(E * tiling.count(), [&](int64_t i) {
    const int64_t e = i / tiling.count();
    const Gemm gemm{.a = op.a.row<float>(offsets[e]),
                    .a_stride = stride_of(op.a),
                    .b = op.b.row<float>(offsets[e]),
                    .b_stride = stride_of(op.b),
                    .c = op.out.row<float>(e * M),
                    .c_stride = stride_of(op.out),
                    .M = M,
                    .N = N,
                    .K = offsets[e + 1] - offsets[e],
                    .a_transposed = true,
                    .accumulate = op.accumulate};
    multiply(tiling.tile(gemm, i % tiling.count()));
  });
}

}  // namespace moemamba
