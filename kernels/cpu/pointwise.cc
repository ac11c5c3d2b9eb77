#include "kernels/pointwise.h"

#include "kernels/cpu/row_blocks.h"
#include "kernels/cpu/simd/pointwise.h"

namespace moemamba {

namespace {

void check_row_limit(const Tensor& rows) {
  if (rows) expect("rows[1]", rows, {1}, DType::i32);
}

// Rows that count: all of `x`, or what the tensor `limit` says now.
int64_t rows_that_count(const Tensor& x, const Tensor& limit) {
  if (!limit) return x.rows();
  const int64_t count = *limit.as<int32_t>();
  check(0 <= count && count <= x.rows(), "rows: expected 0 .. ", x.rows(), ", found ", count);
  return count;
}

// Calls body(row, columns) for the first `rows` rows.
template <class Body>
void for_rows(Stream& stream, int64_t rows, int64_t columns, Body body) {
  for_row_blocks(stream, rows, rows_per_block(columns), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) body(t, columns);
  });
}

}  // namespace

const PointwiseKernels& pointwise_kernels(SimdLevel level) {
  return level == SimdLevel::avx512 ? avx512::pointwise_kernels : avx2::pointwise_kernels;
}

void ActivationForward::check() const {
  expect_real("x[T, F]", x);
  expect("y[T, F]", y, x.shape, x.dtype);
  check_row_limit(rows);
}

void ActivationBackward::check() const {
  expect_real("x[T, F]", x);
  expect("dy[T, F]", dy, x.shape, x.dtype);
  expect("dx[T, F]", dx, x.shape, x.dtype);
  check_row_limit(rows);
}

void SwiGluForward::check() const {
  expect_real("gate[T, F]", gate);
  expect("up[T, F]", up, gate.shape, gate.dtype);
  expect("y[T, F]", y, gate.shape, gate.dtype);
  check_row_limit(rows);
}

void SwiGluBackward::check() const {
  expect_real("gate[T, F]", gate);
  expect("up[T, F]", up, gate.shape, gate.dtype);
  expect("dy[T, F]", dy, gate.shape, gate.dtype);
  expect("dgate[T, F]", dgate, gate.shape, gate.dtype);
  expect("dup[T, F]", dup, gate.shape, gate.dtype);
  check_row_limit(rows);
}

void Add::check() const {
  expect_real("a[T, F]", a);
  expect("b[T, F]", b, a.shape, a.dtype);
  expect("out[T, F]", out, a.shape, a.dtype);
}

void Cast::check() const {
  const auto [P] = dims<1>("from[P]", from);
  expect("from[P]", from, {P});
  expect_real("to[P]", to);
  expect("to[P]", to, {P}, to.dtype);
}

void Sum::check() const {
  const auto [T] = dims<1>("x[T]", x);
  expect("x[T]", x, {T});
  expect("sum[1]", sum, {1}, DType::f64);
}

void run_cpu(Stream& stream, const ActivationForward& op) {
  const auto forward = pointwise_kernels(simd_level()).forward[int(op.kind)];
  for_rows(stream, rows_that_count(op.x, op.rows), op.x.cols(),
           [&](int64_t t, int64_t F) { forward(op.x.row<float>(t), op.y.row<float>(t), F); });
}

void run_cpu(Stream& stream, const ActivationBackward& op) {
  const auto backward = pointwise_kernels(simd_level()).backward[int(op.kind)];
  for_rows(stream, rows_that_count(op.x, op.rows), op.x.cols(), [&](int64_t t, int64_t F) {
    backward(op.x.row<float>(t), op.dy.row<float>(t), op.dx.row<float>(t), F);
  });
}

void run_cpu(Stream& stream, const SwiGluForward& op) {
  const auto forward = pointwise_kernels(simd_level()).swiglu_forward;
  for_rows(stream, rows_that_count(op.gate, op.rows), op.gate.cols(), [&](int64_t t, int64_t F) {
    forward(op.gate.row<float>(t), op.up.row<float>(t), op.y.row<float>(t), F);
  });
}

void run_cpu(Stream& stream, const SwiGluBackward& op) {
  const auto backward = pointwise_kernels(simd_level()).swiglu_backward;
  for_rows(stream, rows_that_count(op.gate, op.rows), op.gate.cols(), [&](int64_t t, int64_t F) {
    backward(op.gate.row<float>(t), op.up.row<float>(t), op.dy.row<float>(t),
             op.dgate.row<float>(t), op.dup.row<float>(t), F);
  });
}

void run_cpu(Stream& stream, const Add& op) {
  const auto add = pointwise_kernels(simd_level()).add;
  for_rows(stream, op.a.rows(), op.a.cols(), [&](int64_t t, int64_t F) {
    add(op.a.row<float>(t), op.b.row<float>(t), op.out.row<float>(t), F);
  });
}

void run_cpu(Stream& stream, const Cast& op) {  // to f32: the CPU has no bf16
  copy(stream, op.from, op.to);
}

void run_cpu(Stream&, const Sum& op) {
  const float* x = op.x.as<float>();
  double total = op.accumulate ? *op.sum.as<double>() : 0;
  for (int64_t t = 0; t < op.x.elements(); ++t) total += double(x[t]);
  *op.sum.as<double>() = total;
}

}  // namespace moemamba
