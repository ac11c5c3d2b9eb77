#include "kernels/bias.h"

#include "kernels/cpu/row_blocks.h"
#include "kernels/cpu/simd/norm.h"
#include "kernels/cpu/simd/pointwise.h"

namespace moemamba {

namespace {

constexpr int64_t kBlock = 64;  // rows that are summed before blocks are

void check_length(const Tensor& rows, int64_t sequences, int64_t first, int64_t positions) {
  const int64_t T = rows.rows(), B = sequences;
  check(B >= 1 ? T % B == 0 : B == 0 && T == 0, "sequences must divide the T = ", T,
        " tokens, found ", B);
  const int64_t L = B ? T / B : 0;
  check(first >= 0 && first + L <= positions, "sequences of ", L, " tokens from position ", first,
        " need as many rows of the table, which has ", positions,
        "; make it longer or the sequences shorter");
}

}  // namespace

void AddBias::check() const {
  const auto [T, F] = dims<2>("x[T, F]", x);
  expect_real("x[T, F]", x);
  expect("bias[F]", bias, {F});
  expect("y[T, F]", y, {T, F}, x.dtype);
}

void BiasBackward::check() const {
  const auto [T, F] = dims<2>("dy[T, F]", dy);
  expect_real("dy[T, F]", dy);
  expect("dbias[F]", dbias, {F});
}

void AddPositions::check() const {
  const auto [T, D] = dims<2>("x[T, D]", x);
  const auto [P, columns] = dims<2>("table[P, D]", table);
  expect_real("x[T, D]", x);
  expect_real("table[P, D]", table);
  expect("table[P, D]", table, {P, D}, table.dtype);
  expect("y[T, D]", y, {T, D}, x.dtype);
  check_length(x, sequences, first_position, P);
}

void PositionsBackward::check() const {
  const auto [T, D] = dims<2>("dy[T, D]", dy);
  const auto [P, columns] = dims<2>("dtable[P, D]", dtable);
  expect_real("dy[T, D]", dy);
  expect("dtable[P, D]", dtable, {P, D});
  check_length(dy, sequences, 0, P);
}

void run_cpu(Stream& stream, const AddBias& op) {
  const auto add = pointwise_kernels(simd_level()).add;
  const int64_t F = op.x.cols();
  for_row_blocks(stream, op.x.rows(), rows_per_block(F), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      add(op.x.row<float>(t), op.bias.as<float>(), op.y.row<float>(t), F);
  });
}

void run_cpu(Stream& stream, const BiasBackward& op) {
  const auto add = pointwise_kernels(simd_level()).add;
  const int64_t T = op.dy.rows(), F = op.dy.cols(), blocks = (T + kBlock - 1) / kBlock;
  auto* parts = reinterpret_cast<float*>(stream.workspace(size_t(blocks * F) * sizeof(float)));
  for_row_blocks(stream, T, kBlock, [&](int64_t begin, int64_t end) {
    float* part = parts + begin / kBlock * F;
    std::copy_n(op.dy.row<float>(begin), F, part);
    for (int64_t t = begin + 1; t < end; ++t) add(part, op.dy.row<float>(t), part, F);
  });
  norm_kernels(simd_level()).sum_blocks(parts, blocks, F, op.dbias.as<float>(), F, op.accumulate);
}

void run_cpu(Stream& stream, const AddPositions& op) {
  if (op.x.rows() == 0) return;
  const auto add = pointwise_kernels(simd_level()).add;
  const int64_t D = op.x.cols(), L = op.x.rows() / op.sequences;
  for_row_blocks(stream, op.x.rows(), rows_per_block(D), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      add(op.x.row<float>(t), op.table.row<float>(op.first_position + t % L), op.y.row<float>(t),
          D);
  });
}

// The sequences' rows of one position lie L rows apart: each is one part of its sum.
void run_cpu(Stream& stream, const PositionsBackward& op) {
  const auto sum_blocks = norm_kernels(simd_level()).sum_blocks;
  const int64_t D = op.dy.cols(), L = op.sequences ? op.dy.rows() / op.sequences : 0;
  for_row_blocks(stream, op.dtable.rows(), rows_per_block(D), [&](int64_t begin, int64_t end) {
    for (int64_t l = begin; l < end; ++l)
      sum_blocks(op.dy.row<float>(l), l < L ? op.sequences : 0, L * op.dy.stride,
                 op.dtable.row<float>(l), D, op.accumulate);
  });
}

}  // namespace moemamba
