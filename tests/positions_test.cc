#include <gtest/gtest.h>

#include "kernels/bias.h"
#include "kernels/cpu/simd/rope.h"
#include "kernels/rope.h"
#include "tests/support/definitions/positions.h"
#include "tests/support/harness.h"

namespace moemamba {
namespace {

// Rotary and learned positions, and the bias, which is a position table of one row.

struct Sizes {
  int64_t B, L, heads, dh;
};
constexpr Sizes kSizes[] = {{1, 1, 1, 2},    {2, 7, 3, 6},    {3, 65, 2, 34},
                            {1, 372, 4, 64}, {2, 128, 1, 32}, {0, 0, 2, 4}};

Rope make_rope(Case& c, const Sizes& s, double starts, int64_t first_position) {
  const int64_t T = s.B * s.L, F = s.heads * s.dh;
  return {.x = c.normal({T, F + s.dh}).column_range(s.dh, F + s.dh),
          .starts = starts > 0 ? c.bytes({T}, starts) : Tensor(),
          .y = c.empty({T, F}),
          .sequences = s.B,
          .head_width = s.dh,
          .first_position = first_position};
}

TEST(Rope, MatchesItsDefinition) {
  Stream stream = Stream::immediate();
  for (const Sizes& s : kSizes)
    for (double starts : {0.0, 0.1})
      for (int64_t first : {0, 1, 100, 1 << 20})
        for (bool inverse : {false, true}) {
          if (s.B == 0) continue;
          SCOPED_TRACE(concat("B", s.B, " L", s.L, " dh", s.dh, " starts ", starts, " first ",
                              first, " inverse ", inverse));
          Case c(1);
          Rope op = make_rope(c, s, starts, first);
          op.inverse = inverse;
          run(stream, op);
          expect_close("y", op.y, definition::rope(op, to_doubles(op.x)));
        }
}

TEST(Rope, InverseIsTheGradient) {
  for (double starts : {0.0, 0.3}) {
    Case c(2);
    Rope op = make_rope(c, {2, 4, 2, 4}, starts, 3);
    const auto x = to_doubles(op.x), dy = to_doubles(c.normal({8, 8}));
    const auto sum = [&](const std::vector<double>& at) {
      return weighted_sum(definition::rope(op, at), dy);
    };
    Rope inverse = op;
    inverse.inverse = true;
    expect_gradient("dx", definition::rope(inverse, dy), sum, x);
  }
}

// A decoder's row at a position is the same bits as the whole sequence's, and in place too.
TEST(Rope, GivesAPositionTheSameBitsInEveryCall) {
  Stream stream = Stream::immediate();
  Case c(3);
  const Rope whole = make_rope(c, {1, 200, 2, 16}, 0, 0);
  run(stream, whole);
  for (int64_t begin : {1, 63, 64, 130}) {
    Rope part = whole;
    part.x = part.y = c.copy_of(whole.x.row_range(begin, begin + 70));
    part.first_position = begin;
    run(stream, part);
    expect_same_bits("rope", int(begin), part.y, whole.y.row_range(begin, begin + 70));
  }
}

TEST(Rope, SameBitsForAnyThreadsAndOnBothBackends) {
  for (const Sizes& s : kSizes)
    for (double starts : {0.0, 0.2}) {
      Case c(4);
      const Rope op = make_rope(c, s, starts, 70);
      expect_threads_agree(op);
      expect_backends_agree(op);
      Rope there = op;
      there.x = c.copy_as(op.x, DType::bf16);
      there.y = c.copy_as(op.y, DType::bf16, true);
      expect_backends_agree(there);
      there.y = there.x;
      there.first_position = 1000000;
      there.inverse = true;
      expect_backends_agree(there);
      there.x = op.x;
      there.y = op.y;
      expect_backends_agree(there);
    }
}

TEST(Rope, BothBackendsKnowTheDocumentsOfALongSequence) {
  for (double starts : {0.0005, 0.01}) {
    Case c(12);
    expect_backends_agree(make_rope(c, {2, 2500, 1, 4}, starts, 0));
  }
}

TEST(RopeKernels, BothInstructionSetsGiveTheSameBits) {
  if (simd_level() != SimdLevel::avx512) GTEST_SKIP() << "this processor has AVX2 only";
  Case c(5);
  for (int64_t half : {1, 16, 19})
    for (bool inverse : {false, true}) {
      const Tensor x = c.normal({6 * half}), angles = c.normal({2, half});
      const Tensor y[] = {c.empty({6 * half}), c.empty({6 * half})};
      for (SimdLevel level : {SimdLevel::avx2, SimdLevel::avx512})
        rope_kernels(level).rotate({.x = x.as<float>(),
                                    .cosines = angles.row<float>(0),
                                    .sines = angles.row<float>(1),
                                    .y = y[int(level)].as<float>(),
                                    .heads = 3,
                                    .half = half,
                                    .inverse = inverse});
      expect_same_bits("rope kernels", int(half), y[0], y[1]);
    }
}

TEST(Rope, RefusesOddHeadsAndAHeadThatDoesNotDivide) {
  Stream stream = Stream::immediate();
  Case c(6);
  Rope op = make_rope(c, {2, 3, 2, 4}, 0, 0);
  op.head_width = 1;
  EXPECT_THROW(run(stream, op), Error);
  op.head_width = 6;
  EXPECT_THROW(run(stream, op), Error);
  op = make_rope(c, {2, 3, 2, 4}, 0, -1);
  EXPECT_THROW(run(stream, op), Error);
}

// Shapes: one, a prime, past a block of sums, a real model's; none.
constexpr std::pair<int64_t, int64_t> kShapes[] = {{1, 1},    {3, 7},   {65, 32}, {131, 33},
                                                   {2, 2048}, {700, 5}, {0, 4}};

std::vector<double> plus(std::vector<double> a, const std::vector<double>& b) {
  for (size_t i = 0; i < a.size(); ++i) a[i] += b[i];
  return a;
}

TEST(Bias, MatchesItsDefinition) {
  Stream stream = Stream::immediate();
  for (auto [T, F] : kShapes) {
    Case c(7);
    const AddBias forward{.x = c.normal({T, F}), .bias = c.normal({F}), .y = c.empty({T, F})};
    run(stream, forward);
    expect_close("y", forward.y,
                 definition::add_rows(to_doubles(forward.x), to_doubles(forward.bias)));
    BiasBackward backward{.dy = c.normal({T, F}), .dbias = c.empty({F})};
    run(stream, backward);
    const auto sums = definition::sum_rows(to_doubles(backward.dy), size_t(F));
    expect_close("dbias", backward.dbias, sums);
    backward.accumulate = true;
    run(stream, backward);
    expect_close("twice dbias", backward.dbias, plus(sums, sums));
  }
}

TEST(Positions, MatchTheirDefinition) {
  Stream stream = Stream::immediate();
  for (int64_t B : {1, 2, 5})
    for (int64_t L : {1, 7, 372})
      for (int64_t more : {0, 3}) {  // positions that do not occur
        Case c(8);
        const int64_t D = 19, T = B * L;
        const Tensor table = c.normal({L + more, D});
        const AddPositions forward{.x = c.normal({T, D}),
                                   .table = table,
                                   .y = c.empty({T, D}),
                                   .sequences = B,
                                   .first_position = more};
        run(stream, forward);
        const auto used = to_doubles(table.row_range(more, L + more));
        expect_close("y", forward.y, definition::add_rows(to_doubles(forward.x), used));
        PositionsBackward backward{
            .dy = c.normal({T, D}), .dtable = c.empty({L + more, D}), .sequences = B};
        run(stream, backward);
        auto sums = definition::sum_rows(to_doubles(backward.dy), size_t(L * D));
        sums.resize(size_t((L + more) * D));
        expect_close("dtable", backward.dtable, sums);
        backward.accumulate = true;
        run(stream, backward);
        expect_close("twice dtable", backward.dtable, plus(sums, sums));
      }
}

TEST(Positions, DefinitionsBackwardIsItsGradient) {
  Case c(9);
  const auto x = to_doubles(c.normal({6, 3})), dy = to_doubles(c.normal({6, 3}));
  for (size_t rows : {1, 2, 3}) {
    const auto table = to_doubles(c.normal({int64_t(rows), 3}));
    const auto sum = [&](const std::vector<double>& at) {
      return weighted_sum(definition::add_rows(x, at), dy);
    };
    expect_gradient("dtable", definition::sum_rows(dy, rows * 3), sum, table);
  }
}

TEST(Positions, SayHowLongTheTableMustBe) {
  Stream stream = Stream::immediate();
  Case c(10);
  AddPositions op{
      .x = c.normal({6, 2}), .table = c.normal({3, 2}), .y = c.empty({6, 2}), .sequences = 2};
  run(stream, op);
  op.first_position = 1;
  EXPECT_THROW(run(stream, op), Error);
  op = {.x = op.x, .table = op.table, .y = op.y, .sequences = 1};
  EXPECT_THROW(run(stream, op), Error);
}

TEST(Positions, SameBitsForAnyThreadsAndOnBothBackends) {
  for (auto [T, F] : kShapes) {
    Case c(11);
    const Tensor x = c.normal({T, F}), y = c.empty({T, F}), table = c.normal({T + 1, F});
    expect_threads_agree(AddBias{.x = x, .bias = c.normal({F}), .y = y});
    expect_threads_agree(BiasBackward{.dy = x, .dbias = c.empty({F})});
    expect_threads_agree(AddPositions{.x = x, .table = table, .y = y, .sequences = T > 0});
    expect_threads_agree(PositionsBackward{.dy = x, .dtable = table, .sequences = T > 0});
  }
}

// Rows past the GPU's parts of sums; whole packs, and widths that end within one.
constexpr std::pair<int64_t, int64_t> kDeviceShapes[] = {
    {40, 512}, {1134, 341}, {17000, 3}, {372, 264}};

TEST(Positions, BothBackendsAgree) {
  std::vector<std::pair<int64_t, int64_t>> shapes(std::begin(kShapes), std::end(kShapes));
  shapes.insert(shapes.end(), std::begin(kDeviceShapes), std::end(kDeviceShapes));
  for (auto [T, F] : shapes)
    for (DType dtype : {DType::f32, DType::bf16})
      for (bool aligned : {false, true}) {
        SCOPED_TRACE(concat("T ", T, " F ", F, " ", name_of(dtype), aligned ? " aligned" : ""));
        Case c(13);
        const int64_t B = T % 2 ? T > 0 : T > 0 ? 2 : 0;
        const Tensor x = c.copy_as(c.normal({T, F}), dtype, aligned);
        const Tensor y = c.copy_as(c.zeros({T, F}), dtype, aligned);
        const Tensor table = c.copy_as(c.normal({T + 1, F}), DType::f32, aligned);
        expect_backends_agree(AddBias{.x = x, .bias = c.normal({F}), .y = y});
        expect_backends_agree(
            BiasBackward{.dy = x, .dbias = c.normal({F}), .accumulate = aligned});
        AddPositions add{
            .x = x, .table = table, .y = y, .sequences = B, .first_position = T > 0};
        expect_backends_agree(add);
        add.table = c.copy_as(table, DType::bf16, aligned);
        expect_backends_agree(add);
        PositionsBackward backward{.dy = x, .dtable = table, .sequences = B};
        expect_backends_agree(backward);
        backward.accumulate = true;
        expect_backends_agree(backward);
      }
}

}  // namespace
}  // namespace moemamba
