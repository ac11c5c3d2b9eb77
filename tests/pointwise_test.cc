#include "kernels/pointwise.h"

#include <gtest/gtest.h>

#include <cmath>

#include "kernels/cpu/simd/pointwise.h"
#include "tests/support/definitions/pointwise.h"
#include "tests/support/harness.h"

namespace moemamba {
namespace {

// Widths: one, a prime, two vectors, one past a block, more rows than a block holds.
constexpr std::pair<int64_t, int64_t> kShapes[] = {{1, 1}, {3, 7}, {5, 32}, {2, 257}, {70, 1031}};
constexpr Activation kActivations[] = {Activation::relu, Activation::gelu, Activation::silu};

TEST(Activation, MatchesItsDefinition) {
  Stream stream = Stream::immediate();
  for (auto [T, F] : kShapes)
    for (Activation kind : kActivations) {
      Case c(1);
      const Tensor x = c.normal({T, F}, 2), dy = c.normal({T, F});
      const Tensor y = c.empty({T, F}), dx = c.empty({T, F});
      run(stream, ActivationForward{.x = x, .y = y, .kind = kind});
      run(stream, ActivationBackward{.x = x, .dy = dy, .dx = dx, .kind = kind});
      expect_close("y", y, definition::activation_forward(kind, to_doubles(x)));
      expect_close("dx", dx, definition::activation_backward(kind, to_doubles(x), to_doubles(dy)));
    }
}

TEST(Activation, DefinitionsSlopeIsItsGradient) {
  Case c(2);
  std::vector<double> x = to_doubles(c.normal({40}, 2));
  const std::vector<double> dy = to_doubles(c.normal({40}));
  for (double& value : x) value += value < 0 ? -0.01 : 0.01;  // away from the kink of relu
  for (Activation kind : kActivations)
    expect_gradient(
        "activation", definition::activation_backward(kind, x, dy),
        [&](const std::vector<double>& at) {
          return weighted_sum(definition::activation_forward(kind, at), dy);
        },
        x);
}

TEST(Activation, GeluIsAccurateFarFromZeroToo) {
  Stream stream = Stream::immediate();
  Case c(3);
  std::vector<double> points;
  for (int i = -1300; i <= 1300; ++i) points.push_back(float(i) / 100);
  const Tensor x = c.values({int64_t(points.size())}, points), y = c.empty(x.shape);
  run(stream, ActivationForward{.x = x, .y = y, .kind = Activation::gelu});
  const std::vector<double> expected = definition::activation_forward(Activation::gelu, points);
  const std::vector<double> found = to_doubles(y);
  for (size_t i = 0; i < points.size(); ++i)  // relative while the value is a normal float
    EXPECT_NEAR(found[i], expected[i], 2e-5 * std::abs(expected[i]) + 1e-36) << "x = " << points[i];
}

TEST(Activation, ExtremesStayFiniteAndNaNStaysNaN) {
  Stream stream = Stream::immediate();
  Case c(4);
  const double nan = std::nan("");
  for (Activation kind : kActivations) {
    const Tensor x = c.values({4}, {-1e30, 1e30, 0, nan}), y = c.empty({4});
    run(stream, ActivationForward{.x = x, .y = y, .kind = kind});
    const std::vector<double> found = to_doubles(y);
    EXPECT_NEAR(found[0], 0, 1e-6);
    EXPECT_FLOAT_EQ(float(found[1]), 1e30f);
    EXPECT_EQ(found[2], 0);
    EXPECT_TRUE(std::isnan(found[3])) << "activation " << int(kind);
  }
}

TEST(Activation, MayRunInPlace) {
  Stream stream = Stream::immediate();
  for (Activation kind : kActivations) {
    Case c(5);
    const Tensor x = c.normal({5, 37}), dy = c.normal({5, 37});
    const std::vector<double> at = to_doubles(x), upstream = to_doubles(dy);
    run(stream, ActivationBackward{.x = x, .dy = dy, .dx = dy, .kind = kind});
    run(stream, ActivationForward{.x = x, .y = x, .kind = kind});
    expect_close("dx", dy, definition::activation_backward(kind, at, upstream));
    expect_close("y", x, definition::activation_forward(kind, at));
  }
}

TEST(Activation, TouchesOnlyTheRowsThatCount) {
  Stream stream = Stream::immediate();
  Case c(6);
  for (int64_t rows : {0, 1, 3, 5}) {
    const Tensor x = c.normal({5, 9}), dy = c.normal({5, 9}), limit = c.integers({1}, rows, rows);
    const Tensor y = c.normal({5, 9}), dx = c.normal({5, 9});
    std::vector<double> expected_y = to_doubles(y), expected_dx = to_doubles(dx);
    const std::vector<double> at = to_doubles(x), upstream = to_doubles(dy);
    for (size_t i = 0; i < size_t(rows * 9); ++i) {
      expected_y[i] = definition::silu(at[i]);
      expected_dx[i] = upstream[i] * definition::silu_slope(at[i]);
    }
    const auto kind = Activation::silu;
    run(stream, ActivationForward{.x = x, .rows = limit, .y = y, .kind = kind});
    run(stream, ActivationBackward{.x = x, .dy = dy, .rows = limit, .dx = dx, .kind = kind});
    expect_close("y", y, expected_y);
    expect_close("dx", dx, expected_dx);
  }
  const Tensor x = c.normal({5, 9}), limit = c.integers({1}, 6, 6);
  EXPECT_THROW(run(stream, ActivationForward{.x = x, .rows = limit, .y = x}), Error);
}

TEST(Activation, NamesTheTensorOfAWrongShape) {
  Stream stream = Stream::immediate();
  Case c(7);
  try {
    run(stream, ActivationForward{.x = c.normal({2, 3}), .y = c.empty({3, 2})});
    FAIL() << "a wrong shape was accepted";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("y[T, F]: expected [2, 3], found [3, 2]"),
              std::string::npos)
        << error.what();
  }
}

constexpr DType kReals[] = {DType::f32, DType::bf16};

TEST(Activation, SameBitsForAnyThreadsAndOnBothBackends) {
  for (auto [T, F] : kShapes)
    for (Activation kind : kActivations) {
      Case c(8);
      const ActivationForward forward{.x = c.normal({T, F}), .y = c.empty({T, F}), .kind = kind};
      const ActivationBackward backward{
          .x = forward.x, .dy = c.normal({T, F}), .dx = c.empty({T, F}), .kind = kind};
      expect_threads_agree(forward);
      expect_threads_agree(backward);
      for (DType dtype : kReals)
        for (bool aligned : {false, true}) {
          const auto as = [&](const Tensor& tensor) { return c.copy_as(tensor, dtype, aligned); };
          ActivationForward there{.x = as(forward.x), .y = as(forward.y), .kind = kind};
          expect_backends_agree(there);
          expect_backends_agree(ActivationBackward{
              .x = as(forward.x), .dy = as(backward.dy), .dx = as(backward.dx), .kind = kind});
          there.x = there.y = as(backward.x);
          expect_backends_agree(there);
        }
    }
}

TEST(Activation, BothBackendsTouchOnlyTheRowsThatCount) {
  for (DType dtype : kReals)
    for (int64_t rows : {0, 1, 40, 69, 70}) {
      Case c(15);
      const auto make = [&](double size) { return c.normal({70, 40}, size, dtype); };
      const Tensor x = make(1), up = make(1), dy = make(1), limit = c.integers({1}, rows, rows);
      const auto kind = Activation::silu;
      const Tensor y = make(0), dx = make(0), other = make(0);
      expect_backends_agree(ActivationForward{.x = x, .rows = limit, .y = y, .kind = kind});
      expect_backends_agree(
          ActivationBackward{.x = x, .dy = dy, .rows = limit, .dx = dx, .kind = kind});
      expect_backends_agree(SwiGluForward{.gate = x, .up = up, .rows = limit, .y = other});
      expect_backends_agree(SwiGluBackward{
          .gate = x, .up = up, .dy = dy, .rows = limit, .dgate = make(0), .dup = make(0)});
    }
}

TEST(SwiGlu, MatchesItsDefinition) {
  Stream stream = Stream::immediate();
  for (auto [T, F] : kShapes) {
    Case c(9);
    const Tensor gate = c.normal({T, F}, 2), up = c.normal({T, F}), dy = c.normal({T, F});
    const Tensor y = c.empty({T, F}), dgate = c.empty({T, F}), dup = c.empty({T, F});
    run(stream, SwiGluForward{.gate = gate, .up = up, .y = y});
    run(stream, SwiGluBackward{.gate = gate, .up = up, .dy = dy, .dgate = dgate, .dup = dup});
    expect_close("y", y, definition::swiglu_forward(to_doubles(gate), to_doubles(up)));
    const auto expected =
        definition::swiglu_backward(to_doubles(gate), to_doubles(up), to_doubles(dy));
    expect_close("dgate", dgate, expected.dgate);
    expect_close("dup", dup, expected.dup);
  }
}

TEST(SwiGlu, DefinitionsBackwardIsItsGradient) {
  Case c(10);
  const auto gate = to_doubles(c.normal({31}, 2)), up = to_doubles(c.normal({31}));
  const auto dy = to_doubles(c.normal({31}));
  const auto g = definition::swiglu_backward(gate, up, dy);
  using Values = std::vector<double>;
  const auto of_gate = [&](const Values& at) {
    return weighted_sum(definition::swiglu_forward(at, up), dy);
  };
  const auto of_up = [&](const Values& at) {
    return weighted_sum(definition::swiglu_forward(gate, at), dy);
  };
  expect_gradient("dgate", g.dgate, of_gate, gate);
  expect_gradient("dup", g.dup, of_up, up);
}

TEST(SwiGlu, TouchesOnlyTheRowsThatCount) {
  Stream stream = Stream::immediate();
  Case c(11);
  const Tensor gate = c.normal({4, 19}), up = c.normal({4, 19}), dy = c.normal({4, 19});
  const Tensor limit = c.integers({1}, 3, 3);
  const Tensor y = c.zeros({4, 19}), dgate = c.zeros({4, 19}), dup = c.zeros({4, 19});
  run(stream, SwiGluForward{.gate = gate, .up = up, .rows = limit, .y = y});
  run(stream,
      SwiGluBackward{.gate = gate, .up = up, .dy = dy, .rows = limit, .dgate = dgate, .dup = dup});
  for (const Tensor& tensor : {y, dgate, dup}) {
    const auto values = to_doubles(tensor);
    EXPECT_NE(values[3 * 19 - 1], 0);
    for (size_t i = 3 * 19; i < values.size(); ++i) EXPECT_EQ(values[i], 0);
  }
}

TEST(SwiGlu, SameBitsForAnyThreadsAndOnBothBackends) {
  for (auto [T, F] : kShapes) {
    Case c(12);
    const Tensor gate = c.normal({T, F}), up = c.normal({T, F});
    const SwiGluForward forward{.gate = gate, .up = up, .y = c.empty({T, F})};
    const SwiGluBackward backward{.gate = gate,
                                  .up = up,
                                  .dy = c.normal({T, F}),
                                  .dgate = c.empty({T, F}),
                                  .dup = c.empty({T, F})};
    expect_threads_agree(forward);
    expect_threads_agree(backward);
    for (DType dtype : kReals)
      for (bool aligned : {false, true}) {
        const auto as = [&](const Tensor& tensor) { return c.copy_as(tensor, dtype, aligned); };
        expect_backends_agree(
            SwiGluForward{.gate = as(gate), .up = as(up), .y = as(forward.y)});
        expect_backends_agree(SwiGluBackward{.gate = as(gate),
                                             .up = as(up),
                                             .dy = as(backward.dy),
                                             .dgate = as(backward.dgate),
                                             .dup = as(backward.dup)});
      }
  }
}

TEST(Add, AddsAlsoInPlace) {
  Stream stream = Stream::immediate();
  for (auto [T, F] : kShapes) {
    Case c(13);
    const Tensor a = c.normal({T, F}), b = c.normal({T, F}), out = c.empty({T, F});
    std::vector<double> expected = to_doubles(a);
    const std::vector<double> other = to_doubles(b);
    for (size_t i = 0; i < expected.size(); ++i) expected[i] += other[i];
    expect_threads_agree(Add{.a = a, .b = b, .out = out});
    for (DType dtype : kReals)
      for (bool aligned : {false, true}) {
        const auto as = [&](const Tensor& tensor) { return c.copy_as(tensor, dtype, aligned); };
        expect_backends_agree(Add{.a = as(a), .b = as(b), .out = as(out)});
      }
    expect_close("out", out, expected);
    run(stream, Add{.a = a, .b = b, .out = a});
    expect_close("out = a", a, expected);
  }
}

// One, a prime, two packs of bf16, past a block of threads and of sums.
constexpr int64_t kFlat[] = {0, 1, 7, 16, 257, 16384, 40009};

TEST(Cast, RoundsToTheNearestAndHalvesToEvenOnAGpu) {
  Case c(16);
  const double step = 1.0 / 128;  // of bf16 between 1 and 2
  const Tensor from = c.values({8}, {1, 1 + step / 2, 1 + 1.5 * step, 1 + 0.51 * step,
                                     -1 - 2.5 * step, 3e38, 0, 1 + 2.25 * step});
  const Tensor expected =
      c.values({8}, {1, 1, 1 + 2 * step, 1 + step, -1 - 2 * step, 3e38, 0, 1 + 2 * step},
               DType::bf16);
  const Cast op{.from = from, .to = c.empty({8}, DType::bf16)};
  Stream cpu = Stream::immediate();
  EXPECT_THROW(run(cpu, op), Error);  // it computes in f32
  std::optional<Stream> other = other_backend();
  if (!other) return;
  const Replica<Cast> there(*other, op);
  run(*other, there.op());
  expect_same_bits("to", 0, to_host(*other, there.op().to, c), expected);
}

TEST(Cast, IsACopyInF32AndTheSameOnBothBackends) {
  Stream stream = Stream::immediate();
  for (int64_t P : kFlat) {
    Case c(17);
    const Tensor from = c.normal({P}), to = c.empty({P});
    run(stream, Cast{.from = from, .to = to});
    expect_same_bits("to", 0, to, from);
    for (DType dtype : kReals)
      expect_backends_agree(Cast{.from = from, .to = c.empty({P}, dtype)});
  }
}

TEST(Sum, AddsInTheOrderOfTheTokens) {
  Stream stream = Stream::immediate();
  for (int64_t T : kFlat) {
    Case c(18);
    const Tensor x = c.uniform({T}, 0, 12), sum = c.values({1}, {0.1}, DType::f64);
    double expected = 0.1;
    for (double value : to_doubles(x)) expected += value;
    run(stream, Sum{.x = x, .sum = sum, .accumulate = true});
    EXPECT_EQ(*sum.as<double>(), expected);  // bit by bit
    expect_backends_agree(Sum{.x = x, .sum = sum});
    expect_backends_agree(Sum{.x = x, .sum = sum, .accumulate = true});
  }
}

TEST(PointwiseKernels, BothInstructionSetsGiveTheSameBits) {
  if (simd_level() != SimdLevel::avx512) GTEST_SKIP() << "this processor has AVX2 only";
  const PointwiseKernels &narrow = pointwise_kernels(SimdLevel::avx2),
                         &wide = pointwise_kernels(SimdLevel::avx512);
  for (int64_t count : {1, 7, 8, 15, 16, 17, 257}) {
    Case c(14);
    const Tensor a = c.normal({count}, 3), b = c.normal({count}), d = c.normal({count});
    const auto expect_same = [&](const char* what, auto call) {
      const Tensor first = c.zeros({2, count}), second = c.zeros({2, count});
      call(narrow, first.row<float>(0), first.row<float>(1));
      call(wide, second.row<float>(0), second.row<float>(1));
      expect_same_bits(what, 0, first, second);
    };
    const float *x = a.as<float>(), *y = b.as<float>(), *dy = d.as<float>();
    using Kernels = const PointwiseKernels&;
    for (int kind = 0; kind < 3; ++kind) {
      expect_same("forward",
                  [&](Kernels k, float* out, float*) { k.forward[kind](x, out, count); });
      expect_same("backward",
                  [&](Kernels k, float* out, float*) { k.backward[kind](x, dy, out, count); });
    }
    expect_same("swiglu",
                [&](Kernels k, float* out, float*) { k.swiglu_forward(x, y, out, count); });
    expect_same("swiglu backward", [&](Kernels k, float* out, float* other) {
      k.swiglu_backward(x, y, dy, out, other, count);
    });
    expect_same("add", [&](Kernels k, float* out, float*) { k.add(x, y, out, count); });
  }
}

}  // namespace
}  // namespace moemamba
