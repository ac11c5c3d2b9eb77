#include "kernels/adamw.h"

#include <cmath>

#include "kernels/cpu/row_blocks.h"
#include "kernels/cpu/simd/adamw.h"

namespace moemamba {

namespace {
constexpr int64_t kBlock = 16384;  // elements; part of what SumOfSquares means, bit by bit
}

const AdamWKernels& adamw_kernels(SimdLevel level) {
  return level == SimdLevel::avx512 ? avx512::adamw_kernels : avx2::adamw_kernels;
}

void AdamW::check() const {
  const auto [P] = dims<1>("value[P]", value);
  expect("gradient[P]", gradient, {P});
  expect("verdict[2]", verdict, {2});
  expect("value[P]", value, {P});
  expect("m[P]", m, {P});
  expect("v[P]", v, {P});
  moemamba::check(step >= 1, "adamw: steps count from 1, found ", step);
}

void SumOfSquares::check() const {
  const auto [P] = dims<1>("x[P]", x);
  expect("x[P]", x, {P});
  expect("sum[1]", sum, {1}, DType::f64);
}

void run_cpu(Stream& stream, const AdamW& op) {
  const float* verdict = op.verdict.as<float>();
  if (verdict[1] == 0) return;
  const double step = double(op.step);
  const AdamWPart all{
      .gradient = op.gradient.as<float>(),
      .value = op.value.as<float>(),
      .m = op.m.as<float>(),
      .v = op.v.as<float>(),
      .clip = verdict[0],
      .keep = float(1 - double(op.lr) * double(op.decay)),
      .beta1 = op.beta1,
      .one_minus_beta1 = float(1 - double(op.beta1)),
      .beta2 = op.beta2,
      .one_minus_beta2 = float(1 - double(op.beta2)),
      .step_size = float(double(op.lr) / (1 - std::pow(double(op.beta1), step))),
      .root_bias = float(1 / std::sqrt(1 - std::pow(double(op.beta2), step))),
      .eps = op.eps,
  };
  const auto update = adamw_kernels(simd_level()).update;
  for_row_blocks(stream, op.value.elements(), kBlock, [&](int64_t begin, int64_t end) {
    AdamWPart part = all;
    part.gradient += begin;
    part.value += begin;
    part.m += begin;
    part.v += begin;
    part.count = end - begin;
    update(part);
  });
}

void run_cpu(Stream& stream, const SumOfSquares& op) {
  const float* x = op.x.as<float>();
  const int64_t P = op.x.elements(), blocks = (P + kBlock - 1) / kBlock;
  auto* parts = reinterpret_cast<double*>(stream.workspace(size_t(blocks) * sizeof(double)));
  const auto sum_of_squares = adamw_kernels(simd_level()).sum_of_squares;
  for_row_blocks(stream, P, kBlock, [&](int64_t begin, int64_t end) {
    parts[begin / kBlock] = sum_of_squares(x + begin, end - begin);
  });
  double total = op.accumulate ? *op.sum.as<double>() : 0;
  for (int64_t b = 0; b < blocks; ++b) total += parts[b];
  *op.sum.as<double>() = total;
}

}  // namespace moemamba
