#include "kernels/adamw.h"

#include <gtest/gtest.h>

#include <cmath>

#include "kernels/cpu/simd/adamw.h"
#include "tests/support/definitions/adamw.h"
#include "tests/support/harness.h"

namespace moemamba {
namespace {

// One, a prime, two vectors, one past sixteen vectors, a block, past two blocks.
constexpr int64_t kSizes[] = {1, 7, 32, 257, 16384, 40009};

AdamW make(Case& c, int64_t P, double clip = 1, double finite = 1) {
  return {.gradient = c.normal({P}),
          .verdict = c.values({2}, {clip, finite}),
          .value = c.normal({P}),
          .m = c.normal({P}, 0.1),
          .v = c.uniform({P}, 0, 0.1)};
}

definition::AdamWOptions options_of(const AdamW& op) {
  return {op.lr, op.beta1, op.beta2, op.eps, op.decay};
}

TEST(AdamW, MatchesItsDefinitionOverManySteps) {
  Stream stream = Stream::immediate();
  for (int64_t P : kSizes) {
    Case c(1);
    AdamW op = make(c, P, 0.25);
    op.lr = 0.02f;
    op.m = c.zeros({P});
    op.v = c.zeros({P});
    definition::AdamWState state{to_doubles(op.value), to_doubles(op.m), to_doubles(op.v)};
    for (op.step = 1; op.step <= 10; ++op.step) {
      op.gradient = c.normal({P});
      auto gradient = to_doubles(op.gradient);
      for (double& g : gradient) g *= 0.25;
      definition::adamw(state, gradient, options_of(op), double(op.step));
      run(stream, op);
    }
    expect_close("value", op.value, state.value);
    expect_close("m", op.m, state.m);
    expect_close("v", op.v, state.v);
  }
}

TEST(AdamW, ItsFirstStepIsTheSignOfTheGradientTimesTheRate) {
  Stream stream = Stream::immediate();
  Case c(2);
  const Tensor value = c.zeros({4});
  run(stream, AdamW{.gradient = c.values({4}, {3, -0.01, 1e-3, -500}),
                    .verdict = c.values({2}, {1, 1}),
                    .value = value,
                    .m = c.zeros({4}),
                    .v = c.zeros({4}),
                    .lr = 0.5f});
  expect_close("value", value, {-0.5, 0.5, -0.5 / (1 + 1e-5), 0.5});
}

TEST(AdamW, ChangesNothingWhenAGradientWasNotFinite) {
  Stream stream = Stream::immediate();
  Case c(3);
  AdamW op = make(c, 100, std::nan(""), 0);
  const auto value = to_doubles(op.value), m = to_doubles(op.m), v = to_doubles(op.v);
  run(stream, op);
  EXPECT_EQ(to_doubles(op.value), value);
  EXPECT_EQ(to_doubles(op.m), m);
  EXPECT_EQ(to_doubles(op.v), v);
}

TEST(AdamW, RefusesAStepBeforeTheFirst) {
  Stream stream = Stream::immediate();
  Case c(4);
  AdamW op = make(c, 3);
  op.step = 0;
  EXPECT_THROW(run(stream, op), Error);
}

TEST(AdamW, SameBitsForAnyThreadsAndOnBothBackends) {
  for (int64_t P : kSizes) {
    Case c(5);
    expect_threads_agree(make(c, P));
    expect_backends_agree(make(c, P));
    expect_backends_agree(make(c, P, 0.3));
    expect_backends_agree(make(c, P, 1, 0));  // nothing is changed
  }
}

// A GPU rounds as the CPU does, so that a run can go on on either.
TEST(AdamW, SameBitsOnBothBackends) {
  std::optional<Stream> other = other_backend();
  if (!other) return;
  Stream cpu = Stream::immediate();
  Case c(9);
  AdamW op = make(c, 4099, 0.7);
  op.step = 31;
  compare_runs(op, cpu, *other, expect_same_bits);
}

TEST(SumOfSquares, MatchesItsDefinitionToTheLastDigits) {
  Stream stream = Stream::immediate();
  for (int64_t P : kSizes) {
    Case c(6);
    const Tensor x = c.normal({P}, 100), sum = c.empty({1}, DType::f64);
    run(stream, SumOfSquares{.x = x, .sum = sum});
    expect_close("sum", sum, {definition::sum_of_squares(to_doubles(x))});
    run(stream, SumOfSquares{.x = x, .sum = sum, .accumulate = true});
    expect_close("sum", sum, {2 * definition::sum_of_squares(to_doubles(x))});
    expect_threads_agree(SumOfSquares{.x = x, .sum = sum});
    expect_backends_agree(SumOfSquares{.x = x, .sum = sum});
  }
}

TEST(SumOfSquares, IsZeroOfNothingAndNotFiniteWhereXIsNot) {
  Stream stream = Stream::immediate();
  Case c(7);
  const Tensor sum = c.empty({1}, DType::f64);
  run(stream, SumOfSquares{.x = c.empty({0}), .sum = sum});
  EXPECT_EQ(*sum.as<double>(), 0);
  run(stream, SumOfSquares{.x = c.values({3}, {1, INFINITY, 2}), .sum = sum});
  EXPECT_FALSE(std::isfinite(*sum.as<double>()));
  run(stream, SumOfSquares{.x = c.values({3}, {1, 2, NAN}), .sum = sum});
  EXPECT_FALSE(std::isfinite(*sum.as<double>()));
  run(stream, SumOfSquares{.x = c.values({2}, {1e30, 1e30}), .sum = sum});  // too large for f32
  EXPECT_NEAR(*sum.as<double>() / 2e60, 1, 1e-6);
}

TEST(AdamWKernels, BothInstructionSetsGiveTheSameBits) {
  if (simd_level() != SimdLevel::avx512) GTEST_SKIP() << "this processor has AVX2 only";
  const AdamWKernels &narrow = adamw_kernels(SimdLevel::avx2),
                     &wide = adamw_kernels(SimdLevel::avx512);
  for (int64_t P : {1, 7, 16, 31, 257}) {
    Case c(8), same(8);
    const AdamW first = make(c, P), second = make(same, P);
    const auto update = [&](const AdamWKernels& kernels, const AdamW& op) {
      kernels.update({.gradient = op.gradient.as<float>(),
                      .value = op.value.as<float>(),
                      .m = op.m.as<float>(),
                      .v = op.v.as<float>(),
                      .count = P,
                      .clip = 0.7f,
                      .keep = 0.99f,
                      .beta1 = 0.9f,
                      .one_minus_beta1 = 0.1f,
                      .beta2 = 0.95f,
                      .one_minus_beta2 = 0.05f,
                      .step_size = 0.01f,
                      .root_bias = 3.f,
                      .eps = 1e-8f});
    };
    update(narrow, first);
    update(wide, second);
    expect_same_bits("value", int(P), first.value, second.value);
    expect_same_bits("m", int(P), first.m, second.m);
    expect_same_bits("v", int(P), first.v, second.v);
    const float* x = first.gradient.as<float>();
    EXPECT_EQ(narrow.sum_of_squares(x, P), wide.sum_of_squares(x, P));
  }
}

}  // namespace
}  // namespace moemamba
