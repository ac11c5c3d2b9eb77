#include "kernels/norm.h"

#include <gtest/gtest.h>

#include "kernels/cpu/simd/norm.h"
#include "tests/support/definitions/norm.h"
#include "tests/support/harness.h"

namespace moemamba {
namespace {

// Widths: one, a prime, two vectors, one past a block, a real model's; rows past one block of sums.
constexpr std::pair<int64_t, int64_t> kShapes[] = {{1, 2}, {3, 7},    {5, 32},    {2, 257},
                                                   {7, 1}, {131, 33}, {17, 4096}, {0, 5}};
constexpr NormKind kKinds[] = {NormKind::layer, NormKind::rms};

struct Operators {
  NormForward forward;
  NormBackward backward;
};

// Both operators over random tensors, with all that is optional.
Operators make(Case& c, NormKind kind, int64_t T, int64_t D) {
  const bool layer = kind == NormKind::layer;
  NormForward forward{.x = c.uniform({T, D}, -1, 3),
                      .residual = c.normal({T, D}),
                      .weight = c.normal({D}),
                      .sum = c.empty({T, D}),
                      .y = c.empty({T, D}),
                      .rstd = c.empty({T}),
                      .kind = kind};
  if (layer) forward.bias = c.normal({D}), forward.mean = c.empty({T});
  NormBackward backward{.dy = c.normal({T, D}),
                        .x = forward.sum,
                        .weight = forward.weight,
                        .mean = forward.mean,
                        .rstd = forward.rstd,
                        .dsum = c.normal({T, D}),
                        .dx = c.empty({T, D}),
                        .dweight = c.empty({D}),
                        .kind = kind};
  if (layer) backward.dbias = c.empty({D});
  return {forward, backward};
}

std::vector<double> plus(std::vector<double> a, const std::vector<double>& b) {
  for (size_t i = 0; i < a.size(); ++i) a[i] += b[i];
  return a;
}

std::vector<double> optional_doubles(const Tensor& tensor) {
  return tensor ? to_doubles(tensor) : std::vector<double>();
}

TEST(Norm, MatchesItsDefinition) {
  Stream stream = Stream::immediate();
  for (auto [T, D] : kShapes)
    for (NormKind kind : kKinds) {
      Case c(1);
      auto [forward, backward] = make(c, kind, T, D);
      run(stream, forward);
      const auto s = plus(to_doubles(forward.x), to_doubles(forward.residual));
      const auto weight = to_doubles(forward.weight), bias = optional_doubles(forward.bias);
      const auto expected = definition::norm_forward(kind, s, weight, bias, forward.eps);
      expect_close("sum", forward.sum, s);
      expect_close("y", forward.y, expected.y);
      expect_close("rstd", forward.rstd, expected.rstd);
      if (kind == NormKind::layer) expect_close("mean", forward.mean, expected.mean);
      if (D < 3) continue;  // dx of the layer norm is a difference of equals there: zero, or nearly

      run(stream, backward);
      const auto g =
          definition::norm_backward(kind, to_doubles(backward.dy), s, weight, forward.eps);
      expect_close("dx", backward.dx, plus(g.ds, to_doubles(backward.dsum)));
      expect_close("dweight", backward.dweight, g.dweight);
      if (kind == NormKind::layer) expect_close("dbias", backward.dbias, g.dbias);
    }
}

TEST(Norm, DefinitionsBackwardIsItsGradient) {
  Case c(2);
  const auto s = to_doubles(c.normal({3, 5})), dy = to_doubles(c.normal({3, 5}));
  const auto weight = to_doubles(c.normal({5})), bias = to_doubles(c.normal({5}));
  using Values = std::vector<double>;
  for (NormKind kind : kKinds) {
    const auto g = definition::norm_backward(kind, dy, s, weight, 1e-5);
    const auto loss = [&](const Values& s_at, const Values& weight_at, const Values& bias_at) {
      return weighted_sum(definition::norm_forward(kind, s_at, weight_at, bias_at, 1e-5).y, dy);
    };
    expect_gradient(
        "ds", g.ds, [&](const Values& at) { return loss(at, weight, bias); }, s);
    expect_gradient(
        "dweight", g.dweight, [&](const Values& at) { return loss(s, at, bias); }, weight);
    if (kind == NormKind::layer)
      expect_gradient(
          "dbias", g.dbias, [&](const Values& at) { return loss(s, weight, at); }, bias);
  }
}

TEST(Norm, TakesItsInputAsTheSumWithoutResidual) {
  Stream stream = Stream::immediate();
  for (NormKind kind : kKinds) {
    Case c(3);
    auto [forward, backward] = make(c, kind, 6, 19);
    forward.residual = forward.sum = {};
    run(stream, forward);
    const auto expected =
        definition::norm_forward(kind, to_doubles(forward.x), to_doubles(forward.weight),
                                 optional_doubles(forward.bias), forward.eps);
    expect_close("y", forward.y, expected.y);
    backward.x = forward.x;
    backward.dsum = {};
    run(stream, backward);
    const auto g = definition::norm_backward(kind, to_doubles(backward.dy), to_doubles(forward.x),
                                             to_doubles(forward.weight), forward.eps);
    expect_close("dx", backward.dx, g.ds);
  }
}

TEST(Norm, MayRunInPlace) {
  Stream stream = Stream::immediate();
  for (NormKind kind : kKinds)
    for (int in_place : {0, 1}) {
      Case c(4), same(4);
      auto [forward, backward] = make(c, kind, 70, 37);
      auto [reference, reference_backward] = make(same, kind, 70, 37);
      forward.sum = in_place ? forward.x : forward.residual;
      backward.x = forward.sum;
      backward.dx = in_place ? backward.dsum : backward.dy;
      run(stream, forward);
      run(stream, backward);
      run(stream, reference);
      run(stream, reference_backward);
      expect_same_bits("sum", in_place, forward.sum, reference.sum);
      expect_same_bits("y", in_place, forward.y, reference.y);
      expect_same_bits("dx", in_place, backward.dx, reference_backward.dx);
      expect_same_bits("dweight", in_place, backward.dweight, reference_backward.dweight);
    }
}

TEST(Norm, AddsToWeightGradientsWhereAsked) {
  Stream stream = Stream::immediate();
  Case c(5);
  auto [forward, backward] = make(c, NormKind::layer, 130, 21);
  run(stream, forward);
  run(stream, backward);
  const auto dweight = to_doubles(backward.dweight), dbias = to_doubles(backward.dbias);
  backward.accumulate = true;
  run(stream, backward);
  expect_close("dweight", backward.dweight, plus(dweight, dweight));
  expect_close("dbias", backward.dbias, plus(dbias, dbias));
}

TEST(Norm, GivesEveryRowZeroMeanAndUnitSpreadFarFromZeroToo) {
  Stream stream = Stream::immediate();
  Case c(6);
  const Tensor x = c.uniform({9, 1031}, 999, 1001), y = c.empty({9, 1031});
  run(stream, NormForward{.x = x,
                          .weight = c.values({1031}, std::vector<double>(1031, 1)),
                          .bias = c.zeros({1031}),
                          .y = y,
                          .mean = c.empty({9}),
                          .rstd = c.empty({9})});
  const auto values = to_doubles(y);
  for (size_t t = 0; t < 9; ++t) {
    double mean = 0, squares = 0;
    for (size_t d = 0; d < 1031; ++d) {
      mean += values[t * 1031 + d] / 1031;
      squares += values[t * 1031 + d] * values[t * 1031 + d] / 1031;
    }
    EXPECT_NEAR(mean, 0, 2e-4);
    EXPECT_NEAR(squares, 1, 2e-4);
  }
}

TEST(Norm, RefusesABiasOfTheRmsNormAndAMissingSum) {
  Stream stream = Stream::immediate();
  Case c(7);
  auto rms = make(c, NormKind::rms, 2, 3);
  rms.forward.bias = c.zeros({3});
  EXPECT_THROW(run(stream, rms.forward), Error);
  auto layer = make(c, NormKind::layer, 2, 3);
  layer.forward.sum = {};
  EXPECT_THROW(run(stream, layer.forward), Error);
  EXPECT_THROW(run(stream, make(c, NormKind::layer, 2, 0).forward), Error);
}

TEST(Norm, SameBitsForAnyThreads) {
  for (auto [T, D] : kShapes)
    for (NormKind kind : kKinds) {
      Case c(8);
      const auto [forward, backward] = make(c, kind, T, D);
      expect_threads_agree(forward);
      expect_threads_agree(backward);
    }
}

// Both operators after a forward run on the CPU, in another dtype and layout.
Operators make_like(Case& c, Operators ops, DType dtype, bool aligned) {
  Stream stream = Stream::immediate();
  run(stream, ops.forward);
  auto& [forward, backward] = ops;
  backward.x = forward.sum;
  for (Tensor* tensor : {&forward.x, &forward.residual, &forward.sum, &forward.y, &backward.dy,
                         &backward.x, &backward.dsum, &backward.dx})
    if (*tensor) *tensor = c.copy_as(*tensor, dtype, aligned);
  return ops;
}

// Past each width to which a GPU's kernels change, and rows past its blocks'.
constexpr std::pair<int64_t, int64_t> kDeviceShapes[] = {
    {10, 512}, {7, 520}, {3, 1024}, {3, 1031}, {2, 8192}, {2200, 24}, {1134, 37}, {372, 341}};

TEST(Norm, BothBackendsAgree) {
  std::vector<std::pair<int64_t, int64_t>> shapes(std::begin(kShapes), std::end(kShapes));
  shapes.insert(shapes.end(), std::begin(kDeviceShapes), std::end(kDeviceShapes));
  for (auto [T, D] : shapes)
    for (NormKind kind : kKinds)
      for (DType dtype : {DType::f32, DType::bf16})
        for (bool aligned : {false, true}) {
          SCOPED_TRACE(concat("T ", T, " D ", D, " kind ", int(kind), " ", name_of(dtype),
                              aligned ? " aligned" : ""));
          Case c(10);
          const auto [forward, backward] = make_like(c, make(c, kind, T, D), dtype, aligned);
          expect_backends_agree(forward);
          expect_backends_agree(backward);
        }
}

TEST(Norm, BothBackendsAgreeInPlaceAndWithoutWhatIsOptional) {
  for (NormKind kind : kKinds)
    for (DType dtype : {DType::f32, DType::bf16}) {
      Case c(11);
      auto [forward, backward] = make_like(c, make(c, kind, 70, 48), dtype, true);
      NormBackward to_dy = backward, to_dsum = backward;
      backward.dsum = {};
      backward.accumulate = true;
      backward.dweight = c.normal({48});
      if (kind == NormKind::layer) backward.dbias = c.normal({48});
      expect_backends_agree(backward);
      to_dy.dy = c.copy_as(to_dy.dy, dtype, true);
      to_dy.dx = to_dy.dy;
      expect_backends_agree(to_dy);
      to_dsum.dx = to_dsum.dsum;
      expect_backends_agree(to_dsum);
      forward.sum = forward.x;
      expect_backends_agree(forward);
      forward.residual = forward.sum = {};
      expect_backends_agree(forward);
    }
}

TEST(NormKernels, BothInstructionSetsGiveTheSameBits) {
  if (simd_level() != SimdLevel::avx512) GTEST_SKIP() << "this processor has AVX2 only";
  for (int64_t count : {1, 7, 15, 16, 17, 257})
    for (bool layer : {true, false}) {
      Case c(9);
      const Tensor x = c.normal({count}), residual = c.normal({count}), weight = c.normal({count});
      const Tensor dy = c.normal({count}), start = c.normal({count});
      Tensor results[2];
      for (SimdLevel level : {SimdLevel::avx2, SimdLevel::avx512}) {
        const NormKernels& kernels = norm_kernels(level);
        const Tensor out = c.zeros({7, count});
        const auto row = [&](int64_t r) { return out.row<float>(r); };
        std::copy_n(start.as<float>(), count, row(3));
        kernels.forward({.x = x.as<float>(),
                         .residual = residual.as<float>(),
                         .weight = weight.as<float>(),
                         .bias = layer ? dy.as<float>() : nullptr,
                         .sum = row(0),
                         .y = row(1),
                         .mean = layer ? row(5) : nullptr,
                         .rstd = row(6),
                         .count = count,
                         .eps = 1e-5f});
        kernels.backward({.dy = dy.as<float>(),
                          .x = row(0),
                          .weight = weight.as<float>(),
                          .mean = layer ? row(5) : nullptr,
                          .rstd = row(6),
                          .dsum = residual.as<float>(),
                          .dx = row(2),
                          .dweight = row(3),
                          .dbias = layer ? row(4) : nullptr,
                          .count = count});
        kernels.sum_blocks(out.row<float>(0), 3, out.stride, row(0), count, true);
        results[int(level)] = out;
      }
      expect_same_bits("norm kernels", int(count), results[0], results[1]);
    }
}

}  // namespace
}  // namespace moemamba
