#include "kernels/cross_entropy.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "kernels/cpu/simd/rows.h"
#include "tests/support/definitions/cross_entropy.h"
#include "tests/support/harness.h"

namespace moemamba {
namespace {

struct Size {
  int64_t T, V, D;
};
// One, primes, a whole number of vectors, more tokens than a tile (1024 at V = 50) and two tiles.
constexpr Size kSizes[] = {{1, 1, 1}, {3, 7, 5}, {33, 64, 16}, {40, 257, 31}, {2049, 50, 7}};

HeadCrossEntropy make(Case& c, Size s, bool gradients, bool accumulate = false,
                      DType dtype = DType::f32) {
  return {.x = c.normal({s.T, s.D}, 1, dtype),
          .weight = c.normal({s.V, s.D}, 1, dtype),
          .targets = c.integers({s.T}, -1, s.V - 1),
          .loss = c.empty({s.T}),
          .dx = gradients ? c.empty({s.T, s.D}, dtype) : Tensor{},
          .dweight = !gradients   ? Tensor{}
                     : accumulate ? c.normal({s.V, s.D})
                                  : c.empty({s.V, s.D}),
          .scale = 0.37f,
          .accumulate = accumulate};
}

definition::HeadCrossEntropyResult expected_of(const HeadCrossEntropy& op) {
  std::vector<int64_t> targets;
  for (double target : to_doubles(op.targets)) targets.push_back(int64_t(target));
  return definition::head_cross_entropy(to_doubles(op.x), to_doubles(op.weight), targets,
                                        op.weight.rows(), op.weight.cols(), op.scale);
}

TEST(HeadCrossEntropy, MatchesItsDefinition) {
  for (Size s : kSizes)
    for (bool accumulate : {false, true}) {
      Case c(1);
      const HeadCrossEntropy op = make(c, s, true, accumulate);
      auto expected = expected_of(op);
      if (accumulate) {
        const std::vector<double> before = to_doubles(op.dweight);
        for (size_t i = 0; i < before.size(); ++i) expected.dweight[i] += before[i];
      }
      expect_backends_agree(op);
      expect_close("loss", op.loss, expected.loss);
      if (s.V > 1) expect_close("dx", op.dx, expected.dx);  // V = 1: rounding against exact zeros
      if (s.V > 1) expect_close("dweight", op.dweight, expected.dweight);
    }
}

TEST(HeadCrossEntropy, GivesTheSameLossWithoutGradients) {
  Stream stream = Stream::immediate();
  for (Size s : kSizes) {
    Case one(2), two(2);
    const HeadCrossEntropy with = make(one, s, true), without = make(two, s, false);
    run(stream, with);
    run(stream, without);
    expect_same_bits(with.name, 0, without.loss, with.loss);
  }
}

// Vocabularies on both sides of where the GPU takes larger blocks, whole packs of four and not,
// whole tiles of 256 and not; rows on 16-byte borders (5, 29, 125: with gaps of 3 elements) and
// not.
TEST(HeadCrossEntropy, BackendsAgree) {
  for (Size s : {Size{3, 7, 5}, Size{7, 64, 16}, Size{40, 257, 31}, Size{372, 50, 7},
                 Size{1134, 129, 29}, Size{5, 5003, 29}, Size{130, 4096, 64}, Size{9, 4100, 5},
                 Size{1, 1, 5}, Size{129, 512, 61}, Size{300, 777, 125}})
    for (DType dtype : {DType::f32, DType::bf16})
      for (int flags = 0; flags < 3; ++flags) {
        Case c(10);
        expect_backends_agree(make(c, s, flags > 0, flags > 1, dtype));
      }
}

// A GPU takes 1280 tokens at once in f32, 2048 in bf16.
TEST(HeadCrossEntropy, BackendsAgreeOnMoreTokensThanAChunk) {
  for (DType dtype : {DType::f32, DType::bf16}) {
    Case c(11);
    expect_backends_agree(make(c, {2100, 50304, 5}, true, true, dtype));
  }
}

// Losses of some hundreds: exp(logit - that of the target) is no number.
TEST(HeadCrossEntropy, BackendsAgreeWhereLossesAreHuge) {
  for (DType dtype : {DType::f32, DType::bf16}) {
    Case c(12);
    HeadCrossEntropy op = make(c, {70, 300, 29}, true, true, dtype);
    op.weight = c.normal({300, 29}, 30, dtype);
    expect_backends_agree(op);
  }
}

TEST(HeadCrossEntropy, BackendsAgreeWhereFewTokensCount) {
  for (DType dtype : {DType::f32, DType::bf16}) {
    Case c(13);
    HeadCrossEntropy op = make(c, {150, 300, 29}, true, false, dtype);
    std::vector<double> targets;
    for (int t = 0; t < 150; ++t) targets.push_back(t % 40 == 7 ? t : -1);
    op.targets = c.values({150}, targets, DType::i32);
    expect_backends_agree(op);
  }
}

// In bf16 a GPU's losses are of f32 logits: far closer than bf16 numbers could be.
TEST(HeadCrossEntropy, LossesOfBackendsAgreeAsThoseOfF32Do) {
  for (Size s : {Size{130, 4096, 125}, Size{9, 5003, 29}}) {
    Case c(14);
    const HeadCrossEntropy op = make(c, s, false, false, DType::bf16);
    expect_backends_agree(op, 1e-5);
  }
}

TEST(HeadCrossEntropy, AGpuShowsNaNAndIdsThatAreNone) {
  std::optional<Stream> gpu = other_backend();
  if (!gpu) return;
  for (DType dtype : {DType::f32, DType::bf16}) {
    Case c(15);
    HeadCrossEntropy op = make(c, {4, 18, 5}, true, false, dtype);
    std::vector<double> x = to_doubles(op.x);
    x[5] = std::nan("");
    from_doubles(x, op.x);
    op.targets = c.values({4}, {3, 4, 18, -2}, DType::i32);
    const Replica<HeadCrossEntropy> there(*gpu, op);
    run(*gpu, there.op());
    const std::vector<double> loss = to_doubles(to_host(*gpu, there.op().loss, c));
    EXPECT_TRUE(std::isfinite(loss[0]));
    for (int t = 1; t < 4; ++t) EXPECT_TRUE(std::isnan(loss[size_t(t)])) << t;
    const std::vector<double> dx = to_doubles(to_host(*gpu, there.op().dx, c));
    EXPECT_TRUE(std::isfinite(dx[0]));
    EXPECT_TRUE(std::isnan(dx[5]));
  }
}

TEST(HeadCrossEntropy, DefinitionsGradientIsItsSlope) {
  Case c(3);
  const int64_t T = 4, V = 6, D = 3;
  const std::vector<double> x = to_doubles(c.normal({T, D})), w = to_doubles(c.normal({V, D}));
  const std::vector<int64_t> targets = {5, -1, 0, 2};
  const double scale = 0.3;
  const auto loss = [&](const std::vector<double>& x, const std::vector<double>& w) {
    const auto result = definition::head_cross_entropy(x, w, targets, V, D, scale);
    return weighted_sum(result.loss, std::vector<double>(size_t(T), scale));
  };
  const auto result = definition::head_cross_entropy(x, w, targets, V, D, scale);
  expect_gradient("x", result.dx, [&](const std::vector<double>& at) { return loss(at, w); }, x);
  expect_gradient("weight", result.dweight,
                  [&](const std::vector<double>& at) { return loss(x, at); }, w);
}

TEST(HeadCrossEntropy, ThreadsDoNotChangeBits) {
  for (Size s : {Size{700, 300, 24}, Size{1100, 50, 7}}) {
    Case c(4);
    expect_threads_agree(make(c, s, true));
    expect_threads_agree(make(c, s, true, true));
  }
}

TEST(HeadCrossEntropy, TokensThatAreNotCountedHaveNoLossAndNoGradient) {
  Stream stream = Stream::immediate();
  Case c(5);
  HeadCrossEntropy op = make(c, {9, 20, 5}, true);
  op.targets = c.integers({9}, -1, -1);
  run(stream, op);
  EXPECT_EQ(to_doubles(op.loss), std::vector<double>(9));
  EXPECT_EQ(to_doubles(op.dx), std::vector<double>(45));
  EXPECT_EQ(to_doubles(op.dweight), std::vector<double>(100));
}

TEST(HeadCrossEntropy, NoTokensMeanNoGradient) {
  Stream stream = Stream::immediate();
  Case c(6);
  HeadCrossEntropy op = make(c, {0, 20, 5}, true);
  run(stream, op);
  EXPECT_EQ(to_doubles(op.dweight), std::vector<double>(100));
  op = make(c, {0, 20, 5}, true, true);
  const std::vector<double> before = to_doubles(op.dweight);
  run(stream, op);
  EXPECT_EQ(to_doubles(op.dweight), before);
}

TEST(HeadCrossEntropy, LargeLogitsStayFiniteAndNaNShows) {
  Stream stream = Stream::immediate();
  Case c(7);
  HeadCrossEntropy op = make(c, {3, 18, 1}, true);
  op.x = c.values({3, 1}, {1, -1, std::nan("")});
  op.weight = c.uniform({18, 1}, 1e4, 2e4);
  op.targets = c.values({3}, {4, 5, 6}, DType::i32);
  run(stream, op);
  const std::vector<double> loss = to_doubles(op.loss), dx = to_doubles(op.dx);
  EXPECT_TRUE(std::isfinite(loss[0]) && std::isfinite(loss[1]));
  EXPECT_TRUE(std::isfinite(dx[0]) && std::isfinite(dx[1]));
  EXPECT_TRUE(std::isnan(loss[2]) && std::isnan(dx[2]));
}

TEST(HeadCrossEntropy, RefusesATargetOutsideTheVocabulary) {
  Stream stream = Stream::immediate();
  Case c(8);
  for (int64_t target : {-2, 20}) {
    HeadCrossEntropy op = make(c, {3, 20, 5}, false);
    op.targets = c.integers({3}, target, target);
    EXPECT_THROW(run(stream, op), Error);
  }
}

// The row kernels of both instruction sets, on lengths around whole vectors.
TEST(RowKernels, AreTheSameBitsOnBothInstructionSets) {
  if (simd_level() != SimdLevel::avx512) GTEST_SKIP() << "this processor has no AVX-512";
  const RowKernels &a = row_kernels(SimdLevel::avx2), &b = row_kernels(SimdLevel::avx512);
  for (int64_t n : {1, 5, 15, 16, 17, 100, 257}) {
    Case c(9);
    const Tensor x = c.normal({n}, 5), y = c.normal({n}), y2 = c.copy_of(y);
    const auto *px = x.as<float>();
    auto *py = y.as<float>(), *py2 = y2.as<float>();
    float found[6];
    a.exp_sum(px, n, &found[0], &found[1]);
    b.exp_sum(px, n, &found[2], &found[3]);
    a.axpy(py, 0.3f, px, n);
    b.axpy(py2, 0.3f, px, n);
    a.add(py, px, n);
    b.add(py2, px, n);
    found[4] = a.dot_and_scale(px, py, py, 1.7f, n);
    found[5] = b.dot_and_scale(px, py2, py2, 1.7f, n);
    expect_same_bits("rows", 0, y2, y);
    a.scaled_exp(py, px, found[0], 0.1f, n);
    b.scaled_exp(py2, px, found[0], 0.1f, n);
    expect_same_bits("scaled_exp", 0, y2, y);
    a.scale(py, 0.7f, px, n);
    b.scale(py2, 0.7f, px, n);
    expect_same_bits("scale", 0, y2, y);
    EXPECT_EQ(0, std::memcmp(&found[0], &found[2], 2 * sizeof(float))) << n;
    EXPECT_EQ(0, std::memcmp(&found[4], &found[5], sizeof(float))) << n;
  }
}

}  // namespace
}  // namespace moemamba
