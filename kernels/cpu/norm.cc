#include "kernels/norm.h"

#include "kernels/cpu/row_blocks.h"
#include "kernels/cpu/simd/norm.h"

namespace moemamba {

namespace {

constexpr int64_t kBlock = 64;  // rows whose weight gradients are summed before blocks are

}  // namespace

const NormKernels& norm_kernels(SimdLevel level) {
  return level == SimdLevel::avx512 ? avx512::norm_kernels : avx2::norm_kernels;
}

void NormForward::check() const {
  const auto [T, D] = dims<2>("x[T, D]", x);
  moemamba::check(D > 0, "x[T, D]: a row to be normalised has at least one column, found ",
                  to_string(x.shape));
  expect_real("x[T, D]", x);
  expect("weight[D]", weight, {D});
  expect("y[T, D]", y, {T, D}, x.dtype);
  expect("rstd[T]", rstd, {T});
  if (residual) {
    expect("residual[T, D]", residual, {T, D}, x.dtype);
    expect("sum[T, D], needed with residual", sum, {T, D}, x.dtype);
  }
  if (kind == NormKind::layer) {
    expect("bias[D]", bias, {D});
    expect("mean[T]", mean, {T});
  } else {
    moemamba::check(!bias && !mean, "the RMS norm has neither bias nor mean; leave them out");
  }
}

void NormBackward::check() const {
  const auto [T, D] = dims<2>("x[T, D]", x);
  moemamba::check(D > 0, "x[T, D]: a row to be normalised has at least one column, found ",
                  to_string(x.shape));
  expect_real("x[T, D]", x);
  expect("dy[T, D]", dy, {T, D}, x.dtype);
  expect("weight[D]", weight, {D});
  expect("rstd[T]", rstd, {T});
  expect("dx[T, D]", dx, {T, D}, x.dtype);
  expect("dweight[D]", dweight, {D});
  if (dsum) expect("dsum[T, D]", dsum, {T, D}, x.dtype);
  if (kind == NormKind::layer) {
    expect("mean[T]", mean, {T});
    expect("dbias[D]", dbias, {D});
  } else {
    moemamba::check(!dbias && !mean, "the RMS norm has neither bias nor mean; leave them out");
  }
}

void run_cpu(Stream& stream, const NormForward& op) {
  const auto [T, D] = dims<2>("x[T, D]", op.x);
  const auto forward = norm_kernels(simd_level()).forward;
  const bool layer = op.kind == NormKind::layer;
  for_row_blocks(stream, T, rows_per_block(D), [&, D = D](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      forward({.x = op.x.row<float>(t),
               .residual = op.residual ? op.residual.row<float>(t) : nullptr,
               .weight = op.weight.as<float>(),
               .bias = layer ? op.bias.as<float>() : nullptr,
               .sum = op.residual ? op.sum.row<float>(t) : nullptr,
               .y = op.y.row<float>(t),
               .mean = layer ? op.mean.as<float>() + t : nullptr,
               .rstd = op.rstd.as<float>() + t,
               .count = D,
               .eps = op.eps});
  });
}

// Each block of rows sums its weight gradients in the workspace ([blocks][dweight, dbias][D]); then
// the blocks are added in order.
void run_cpu(Stream& stream, const NormBackward& op) {
  const auto [T, D] = dims<2>("x[T, D]", op.x);
  const NormKernels& kernels = norm_kernels(simd_level());
  const bool layer = op.kind == NormKind::layer;
  const int64_t blocks = (T + kBlock - 1) / kBlock;
  auto* parts = reinterpret_cast<float*>(stream.workspace(size_t(blocks * 2 * D) * sizeof(float)));
  for_row_blocks(stream, T, kBlock, [&, D = D](int64_t begin, int64_t end) {
    float* dweight = parts + begin / kBlock * 2 * D;
    std::fill_n(dweight, 2 * D, 0.f);
    for (int64_t t = begin; t < end; ++t)
      kernels.backward({.dy = op.dy.row<float>(t),
                        .x = op.x.row<float>(t),
                        .weight = op.weight.as<float>(),
                        .mean = layer ? op.mean.as<float>() + t : nullptr,
                        .rstd = op.rstd.as<float>() + t,
                        .dsum = op.dsum ? op.dsum.row<float>(t) : nullptr,
                        .dx = op.dx.row<float>(t),
                        .dweight = dweight,
                        .dbias = layer ? dweight + D : nullptr,
                        .count = D});
  });
  kernels.sum_blocks(parts, blocks, 2 * D, op.dweight.as<float>(), D, op.accumulate);
  if (layer) kernels.sum_blocks(parts + D, blocks, 2 * D, op.dbias.as<float>(), D, op.accumulate);
}

}  // namespace moemamba
