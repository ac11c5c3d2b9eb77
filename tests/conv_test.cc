#include <gtest/gtest.h>

#include "kernels/cpu/conv.h"
#include "tests/support/definitions/conv.h"
#include "tests/support/harness.h"
#include "tests/support/levels.h"

namespace moemamba {
namespace {

struct Sizes {
  int64_t B, L, D, W;
};
constexpr Sizes kSizes[] = {{1, 1, 1, 1},   {2, 2, 16, 4},   {3, 7, 17, 8},  {2, 31, 5, 2},
                            {1, 64, 33, 4}, {2, 65, 341, 4}, {1, 372, 17, 3}};
// For backends that cut otherwise: around a run of tokens, widths that go in packs.
constexpr Sizes kMoreSizes[] = {{1, 1, 64, 4},   {2, 2, 8, 8},    {3, 66, 24, 8},
                                {1, 1134, 40, 4}, {2, 127, 16, 1}, {1, 67, 48, 6},
                                {2, 128, 264, 4}, {1, 65536, 8, 4}};

struct Options {
  bool borders;   // initial, final
  double starts;  // probability
};
constexpr Options kOptions[] = {{false, 0}, {true, 0}, {true, 0.15}, {true, 0.9}};

struct ConvCase {
  Case c;
  ConvForward forward;
  ConvBackward backward;

  // dense: rows without padding, as an arena hands them out.
  ConvCase(uint64_t seed, const Sizes& s, const Options& o, DType dtype = DType::f32,
           bool dense = false)
      : c(seed) {
    const auto [B, L, D, W] = s;
    const int64_t T = B * L;
    const auto make = [&](auto how, Shape shape) {
      return dense ? how({shape.elements()}).reshaped(shape) : how(shape);
    };
    const auto normal = [&](Shape shape) {
      return make([&](Shape of) { return c.normal(of, 1, dtype); }, shape);
    };
    const auto empty = [&](Shape shape) {
      return make([&](Shape of) { return c.empty(of, dtype); }, shape);
    };
    const Tensor halves = normal({T, 2 * D}), dhalves = empty({T, 2 * D});
    forward = {.x = halves.column_range(0, D),
               .weight = dense ? c.normal({D * W}).reshaped({D, W}) : c.normal({D, W}),
               .bias = c.normal({D}),
               .initial = o.borders ? normal({B, W - 1, D}) : Tensor(),
               .starts = o.starts > 0 ? c.bytes({T}, o.starts) : Tensor(),
               .y = empty({T, D}),
               .final = o.borders ? empty({B, W - 1, D}) : Tensor(),
               .sequences = B};
    backward = {.x = forward.x,
                .weight = forward.weight,
                .bias = forward.bias,
                .initial = forward.initial,
                .starts = forward.starts,
                .dy = normal({T, D}),
                .dfinal = o.borders ? normal({B, W - 1, D}) : Tensor(),
                .dx = dhalves.column_range(0, D),
                .dweight = c.empty({D, W}),
                .dbias = c.empty({D}),
                .dinitial = o.borders ? empty({B, W - 1, D}) : Tensor(),
                .sequences = B};
  }
};

definition::ConvGradient defined_gradient(const ConvBackward& op) {
  return definition::conv_backward(definition::ConvInput(op), to_doubles(op.dy),
                                   op.dfinal ? to_doubles(op.dfinal) : std::vector<double>());
}

void expect_gradient_close(const ConvBackward& op, const definition::ConvGradient& expected) {
  expect_close("dx", op.dx, expected.dx);
  expect_close("dweight", op.dweight, expected.dweight);
  expect_close("dbias", op.dbias, expected.dbias);
  if (op.dinitial) expect_close("dinitial", op.dinitial, expected.dinitial);
}

TEST(Conv, MatchesItsDefinition) {
  Stream stream = Stream::immediate();
  for (const Sizes& s : kSizes)
    for (const Options& o : kOptions) {
      SCOPED_TRACE(concat("B", s.B, " L", s.L, " D", s.D, " W", s.W, " starts ", o.starts));
      const ConvCase test(1, s, o);
      run(stream, test.forward);
      run(stream, test.backward);
      const auto expected = definition::conv_forward(definition::ConvInput(test.forward));
      expect_close("y", test.forward.y, expected.y);
      if (test.forward.final) expect_close("final", test.forward.final, expected.final);
      expect_gradient_close(test.backward, defined_gradient(test.backward));
    }
}

TEST(Conv, DefinitionsBackwardIsItsGradient) {
  for (double starts : {0.0, 0.2}) {
    const ConvCase test(2, {2, 6, 3, 4}, {true, starts});
    const definition::ConvInput in(test.forward);
    const std::vector<double> dy = to_doubles(test.backward.dy);
    const std::vector<double> dfinal = to_doubles(test.backward.dfinal);
    const definition::ConvGradient g = definition::conv_backward(in, dy, dfinal);
    const auto check_field = [&](const char* what,
                                 std::vector<double> definition::ConvInput::*field,
                                 const std::vector<double>& gradient) {
      const auto sum = [&](const std::vector<double>& at) {
        definition::ConvInput moved = in;
        moved.*field = at;
        const definition::ConvResult result = definition::conv_forward(moved);
        return weighted_sum(result.y, dy) + weighted_sum(result.final, dfinal);
      };
      expect_gradient(what, gradient, sum, in.*field);
    };
    check_field("dx", &definition::ConvInput::x, g.dx);
    check_field("dweight", &definition::ConvInput::weight, g.dweight);
    check_field("dbias", &definition::ConvInput::bias, g.dbias);
    check_field("dinitial", &definition::ConvInput::initial, g.dinitial);
  }
}

std::vector<double> joined(std::vector<double> first, const std::vector<double>& second) {
  first.insert(first.end(), second.begin(), second.end());
  return first;
}

// Cuts one sequence at token 2 or 41: with the carried inputs, or at a document start without.
TEST(Conv, PartsEqualTheWhole) {
  Stream stream = Stream::immediate();
  for (int64_t cut : {2, 41})
    for (bool start : {false, true}) {
      const int64_t L = 75, D = 33, W = 4;
      ConvCase test(3, {1, L, D, W}, {true, 0});
      std::vector<double> starts(static_cast<size_t>(L));
      starts[size_t(cut)] = start;
      test.forward.starts = test.c.values({L}, starts, DType::u8);
      ConvForward first = test.forward, second = test.forward;
      first.starts = second.starts = {};
      first.x = test.forward.x.row_range(0, cut);
      first.y = test.c.empty({cut, D});
      first.final = test.c.empty({1, W - 1, D});
      second.x = test.forward.x.row_range(cut, L);
      second.y = test.c.empty({L - cut, D});
      second.initial = start ? Tensor() : first.final;
      second.final = test.c.empty({1, W - 1, D});
      run(stream, test.forward);
      run(stream, first);
      run(stream, second);
      EXPECT_EQ(to_doubles(test.forward.y), joined(to_doubles(first.y), to_doubles(second.y)));
      EXPECT_EQ(to_doubles(test.forward.final), to_doubles(second.final));
    }
}

TEST(Conv, AddsToParameterGradientsWhenAsked) {
  Stream stream = Stream::immediate();
  ConvCase test(4, {2, 9, 18, 4}, {true, 0.1});
  definition::ConvGradient expected = defined_gradient(test.backward);
  for (auto [field, sum] : {std::pair(&ConvBackward::dweight, &expected.dweight),
                            std::pair(&ConvBackward::dbias, &expected.dbias)}) {
    test.backward.*field = test.c.normal((test.backward.*field).shape);
    const std::vector<double> before = to_doubles(test.backward.*field);
    for (size_t i = 0; i < before.size(); ++i) (*sum)[i] += before[i];
  }
  test.backward.accumulate = true;
  run(stream, test.backward);
  expect_gradient_close(test.backward, expected);
}

TEST(Conv, SameBitsForAnyThreads) {
  for (const Sizes& s : kSizes) {
    const ConvCase test(5, s, kOptions[2]);
    expect_threads_agree(test.forward);
    expect_threads_agree(test.backward);
  }
}

TEST(Conv, BackendsAgree) {
  for (DType dtype : {DType::f32, DType::bf16})
    for (bool dense : {false, true})
      for (const Options& o : kOptions) {
        const auto compare = [&](const Sizes& s) {
          SCOPED_TRACE(concat(name_of(dtype), dense ? " dense" : "", " B", s.B, " L", s.L, " D",
                              s.D, " W", s.W, " starts ", o.starts));
          const ConvCase test(5, s, o, dtype, dense);
          expect_backends_agree(test.forward);
          expect_backends_agree(test.backward);
        };
        for (const Sizes& s : kSizes) compare(s);
        for (const Sizes& s : kMoreSizes) compare(s);
      }
}

TEST(Conv, BackendsAgreeWhereGradientsAreAdded) {
  ConvCase test(8, {2, 70, 18, 4}, {true, 0.1});
  for (auto field : {&ConvBackward::dweight, &ConvBackward::dbias})
    test.backward.*field = test.c.normal((test.backward.*field).shape);
  test.backward.accumulate = true;
  expect_backends_agree(test.backward);
}

TEST(Conv, SameBitsOnBothInstructionSets) {
  if (simd_level() != SimdLevel::avx512) GTEST_SKIP() << "this processor has no AVX-512";
  Stream stream = Stream::immediate();
  for (const Sizes& s : kSizes) {
    const ConvCase test(6, s, kOptions[2]);
    expect_levels_agree(stream, test.forward);
    expect_levels_agree(stream, test.backward);
  }
}

TEST(Conv, NoSequencesAreNoWork) {
  Stream stream = Stream::immediate();
  const ConvCase test(7, {0, 0, 17, 4}, {false, 0});
  run(stream, test.forward);
  run(stream, test.backward);
  EXPECT_EQ(to_doubles(test.backward.dbias), std::vector<double>(17));
}

}  // namespace
}  // namespace moemamba
