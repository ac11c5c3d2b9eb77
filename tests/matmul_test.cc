#include "kernels/matmul.h"

#include <gtest/gtest.h>

#include <cmath>

#include "kernels/pointwise.h"
#include "tests/support/definitions/matmul.h"
#include "tests/support/harness.h"

namespace moemamba {
namespace {

struct Size {
  int64_t M, N, K;
};
// One, primes, one past a tile, several tiles, and K long enough for blocks of it.
constexpr Size kSizes[] = {{1, 1, 1},     {3, 7, 5},      {2, 257, 31},   {257, 1025, 3},
                           {300, 40, 64}, {17, 33, 2049}, {40, 24, 9001}, {1, 64, 4096}};

std::vector<int64_t> integers_of(const Tensor& tensor) {
  std::vector<int64_t> list;
  for (double value : to_doubles(tensor)) list.push_back(int64_t(value));
  return list;
}

Matmul make(Case& c, Size s, bool a_transposed, bool b_transposed, bool accumulate) {
  return {.a = c.normal(a_transposed ? Shape{s.K, s.M} : Shape{s.M, s.K}),
          .b = c.normal(b_transposed ? Shape{s.N, s.K} : Shape{s.K, s.N}),
          .out = accumulate ? c.normal({s.M, s.N}) : c.empty({s.M, s.N}),
          .a_transposed = a_transposed,
          .b_transposed = b_transposed,
          .accumulate = accumulate};
}

// Normal numbers without gaps between the rows, so that rows begin where their width says.
Tensor dense(Case& c, Shape shape, DType dtype) {
  return c.normal({shape.elements()}, 1, dtype).reshaped(shape);
}

std::vector<double> sum_of(std::vector<double> a, const std::vector<double>& b) {
  for (size_t i = 0; i < a.size(); ++i) a[i] += b[i];
  return a;
}

TEST(Matmul, MatchesItsDefinition) {
  for (Size s : kSizes)
    for (int flags = 0; flags < 8; ++flags) {
      Case c(1);
      const Matmul op = make(c, s, flags & 1, flags & 2, flags & 4);
      std::vector<double> expected = definition::matmul(
          to_doubles(op.a), to_doubles(op.b), s.M, s.N, s.K, op.a_transposed, op.b_transposed);
      if (op.accumulate) expected = sum_of(expected, to_doubles(op.out));
      expect_backends_agree(op);
      expect_close("out", op.out, expected);
    }
}

// Of a, b and out: all alike; gradients of weights; the router's three products.
constexpr DType kMixes[][3] = {{DType::bf16, DType::bf16, DType::bf16},
                               {DType::bf16, DType::bf16, DType::f32},
                               {DType::bf16, DType::f32, DType::f32},
                               {DType::f32, DType::bf16, DType::f32},
                               {DType::f32, DType::f32, DType::bf16}};

TEST(Matmul, BackendsAgreeInEveryMixOfDTypes) {
  for (Size s : kSizes)
    for (const auto& [a, b, out] : kMixes)
      for (int flags = 0; flags < 8; ++flags) {
        Case c(10);
        const bool a_transposed = flags & 1, b_transposed = flags & 2, accumulate = flags & 4;
        expect_backends_agree(
            Matmul{.a = c.normal(a_transposed ? Shape{s.K, s.M} : Shape{s.M, s.K}, 1, a),
                   .b = c.normal(b_transposed ? Shape{s.N, s.K} : Shape{s.K, s.N}, 1, b),
                   .out = accumulate ? c.normal({s.M, s.N}, 1, out) : c.empty({s.M, s.N}, out),
                   .a_transposed = a_transposed,
                   .b_transposed = b_transposed,
                   .accumulate = accumulate});
      }
}

// Lengths of sequences, and widths that are whole numbers of 16 bytes or not.
TEST(Matmul, BackendsAgreeOnDenseRows) {
  for (Size s : {Size{7, 64, 32}, Size{372, 96, 64}, Size{1134, 48, 341}, Size{64, 341, 8}})
    for (DType dtype : {DType::f32, DType::bf16})
      for (bool transposed : {false, true}) {
        Case c(11);
        expect_backends_agree(
            Matmul{.a = dense(c, transposed ? Shape{s.K, s.M} : Shape{s.M, s.K}, dtype),
                   .b = dense(c, transposed ? Shape{s.K, s.N} : Shape{s.N, s.K}, dtype),
                   .out = dense(c, {s.M, s.N}, dtype),
                   .a_transposed = transposed,
                   .b_transposed = !transposed,
                   .accumulate = transposed});
      }
}

TEST(Matmul, ThreadsDoNotChangeBits) {
  for (Size s : {Size{520, 192, 64}, Size{192, 96, 4096}, Size{64, 48, 9001}})
    for (bool accumulate : {false, true}) {
      Case c(2);
      expect_threads_agree(make(c, s, true, false, accumulate));
      expect_threads_agree(make(c, s, false, true, accumulate));
    }
}

TEST(Matmul, EmptySumIsZero) {
  Stream stream = Stream::immediate();
  Case c(3);
  Matmul op = make(c, {3, 5, 0}, false, false, false);
  run(stream, op);
  EXPECT_EQ(to_doubles(op.out), std::vector<double>(15));
  op.out = c.normal({3, 5});
  op.accumulate = true;
  const std::vector<double> before = to_doubles(op.out);
  run(stream, op);
  EXPECT_EQ(to_doubles(op.out), before);
  run(stream, make(c, {0, 5, 4}, false, false, false));
  run(stream, make(c, {3, 0, 4}, false, true, false));
}

TEST(Matmul, WorksOnPartsOfRows) {
  Stream stream = Stream::immediate();
  Case c(4);
  const Tensor a = c.normal({6, 20}).column_range(5, 13), b = c.normal({8, 9});
  const Tensor wide = c.zeros({6, 30});
  run(stream, Matmul{.a = a, .b = b, .out = wide.column_range(10, 19)});
  expect_close("out", wide.column_range(10, 19),
               definition::matmul(to_doubles(a), to_doubles(b), 6, 9, 8));
  EXPECT_EQ(to_doubles(wide.column_range(0, 10)), std::vector<double>(60));
  EXPECT_EQ(to_doubles(wide.column_range(19, 30)), std::vector<double>(66));
}

TEST(Matmul, NamesWhatDoesNotFit) {
  Stream stream = Stream::immediate();
  Case c(5);
  Matmul op = make(c, {3, 5, 4}, false, false, false);
  op.b = c.normal({5, 4});
  EXPECT_THROW(run(stream, op), Error);
  op.b_transposed = true;
  EXPECT_NO_THROW(run(stream, op));
}

struct Groups {
  std::vector<double> offsets;
  int64_t rows;  // capacity
};
// Even, one group, empty ones at both ends and between, nothing at all, more than a tile's rows.
const Groups kGroups[] = {{{0, 4, 8}, 8},
                          {{0, 5}, 5},
                          {{0, 0, 7, 7, 9, 9}, 12},
                          {{0, 0, 0}, 3},
                          {{0, 0, 0}, 0},
                          {{0, 300, 301, 900}, 901}};

TEST(GroupedMatmul, MatchesItsDefinitionAndLeavesOtherRowsAlone) {
  for (const Groups& groups : kGroups)
    for (bool b_transposed : {false, true}) {
      Case c(6);
      const int64_t E = int64_t(groups.offsets.size()) - 1, N = 37, K = 11;
      const GroupedMatmul op{.a = c.normal({groups.rows, K}),
                             .b = c.normal(b_transposed ? Shape{E, N, K} : Shape{E, K, N}),
                             .offsets = c.values({E + 1}, groups.offsets, DType::i32),
                             .out = c.empty({groups.rows, N}),
                             .b_transposed = b_transposed};
      expect_threads_agree(op);
      const int64_t end = int64_t(groups.offsets.back());
      expect_close("out", op.out.row_range(0, end),
                   definition::grouped_matmul(to_doubles(op.a), to_doubles(op.b),
                                              integers_of(op.offsets), N, K, b_transposed));
      for (double value : to_doubles(op.out.row_range(end, groups.rows)))
        EXPECT_TRUE(std::isnan(value));
    }
}

TEST(GroupedOuter, MatchesItsDefinition) {
  for (const Groups& groups : kGroups)
    for (bool accumulate : {false, true}) {
      Case c(7);
      const int64_t E = int64_t(groups.offsets.size()) - 1, M = 19, N = 6;
      const GroupedOuter op{.a = c.normal({groups.rows, M}),
                            .b = c.normal({groups.rows, N}),
                            .offsets = c.values({E + 1}, groups.offsets, DType::i32),
                            .out = accumulate ? c.normal({E, M, N}) : c.empty({E, M, N}),
                            .accumulate = accumulate};
      std::vector<double> expected = definition::grouped_outer(
          to_doubles(op.a), to_doubles(op.b), integers_of(op.offsets), M, N);
      if (accumulate) expected = sum_of(expected, to_doubles(op.out));
      expect_threads_agree(op);
      expect_close("out", op.out, expected);
    }
}

// Fewer and more than a tile of the GPU's (128 x 256 x 64, 128 x 128 x 16), with and without rows
// on 16-byte borders: gaps of 3 elements make 5 and 13 whole, and 64 odd.
constexpr Size kWidths[] = {{1, 1, 1},   {0, 37, 11},   {130, 257, 13},
                            {64, 64, 64}, {128, 264, 5}, {200, 513, 141}};

TEST(GroupedMatmul, BackendsAgree) {
  for (const Groups& groups : kGroups)
    for (auto [unused, N, K] : kWidths)
      for (DType dtype : {DType::f32, DType::bf16})
        for (int flags = 0; flags < 4; ++flags) {
          Case c(12);
          const int64_t E = int64_t(groups.offsets.size()) - 1;
          const bool b_transposed = flags & 1, gaps = flags & 2;
          const Shape b = b_transposed ? Shape{E, N, K} : Shape{E, K, N};
          expect_backends_agree(GroupedMatmul{
              .a = gaps ? c.normal({groups.rows, K}, 1, dtype) : dense(c, {groups.rows, K}, dtype),
              .b = gaps ? c.normal(b, 1, dtype) : dense(c, b, dtype),
              .offsets = c.values({E + 1}, groups.offsets, DType::i32),
              .out = c.zeros({groups.rows, N}, dtype),  // those past the end stay zeros
              .b_transposed = b_transposed});
        }
}

TEST(GroupedOuter, BackendsAgree) {
  for (const Groups& groups : kGroups)
    for (auto [M, N, unused] : kWidths)
      for (DType dtype : {DType::f32, DType::bf16})
        for (int flags = 0; flags < 4; ++flags) {
          Case c(13);
          const int64_t E = int64_t(groups.offsets.size()) - 1;
          const bool accumulate = flags & 1, gaps = flags & 2;
          const Shape a = {groups.rows, M}, b = {groups.rows, N};
          expect_backends_agree(
              GroupedOuter{.a = gaps ? c.normal(a, 1, dtype) : dense(c, a, dtype),
                           .b = gaps ? c.normal(b, 1, dtype) : dense(c, b, dtype),
                           .offsets = c.values({E + 1}, groups.offsets, DType::i32),
                           .out = accumulate ? c.normal({E, M, N}) : c.empty({E, M, N}),
                           .accumulate = accumulate});
        }
}

// What wgmma takes on Hopper (tiles of 128 x 256 x 64): rows on 16-byte borders, groups of less
// and more rows than a step along K, a warpgroup's part and a tile, columns and K that end within
// one. Rows that belong to no group are not finite: nobody may multiply them, not even by zero.
const Groups kUneven = {{0, 0, 1, 64, 128, 193, 320, 448, 577, 877}, 900};

Tensor poisoned(Case& c, int64_t width) {
  const Tensor tensor = dense(c, {kUneven.rows, width}, DType::bf16);
  const Tensor past = tensor.row_range(int64_t(kUneven.offsets.back()), kUneven.rows);
  from_doubles(std::vector<double>(size_t(past.elements()), NAN), past);
  return tensor;
}

TEST(GroupedMatmul, BackendsAgreeOnUnevenGroups) {
  for (int64_t N : {136, 512})
    for (int64_t K : {64, 72, 512})
      for (int flags = 0; flags < 4; ++flags) {
        Case c(15);
        const bool b_transposed = flags & 1, gaps = flags & 2;
        const Shape b = b_transposed ? Shape{9, N, K} : Shape{9, K, N}, out = {kUneven.rows, N};
        expect_backends_agree(
            GroupedMatmul{.a = poisoned(c, K),
                          .b = dense(c, b, DType::bf16),
                          .offsets = c.values({10}, kUneven.offsets, DType::i32),
                          .out = gaps ? c.zeros(out, DType::bf16)
                                      : c.zeros({out.elements()}, DType::bf16).reshaped(out),
                          .b_transposed = b_transposed});
      }
}

TEST(GroupedOuter, BackendsAgreeOnUnevenGroups) {
  for (int64_t M : {64, 200, 512})
    for (int64_t N : {136, 512})
      for (int flags = 0; flags < 4; ++flags) {
        Case c(16);
        const bool accumulate = flags & 1, gaps = flags & 2;
        const Shape out = {9, M, N};
        const Tensor before = gaps ? c.normal(out) : dense(c, out, DType::f32);
        expect_backends_agree(
            GroupedOuter{.a = poisoned(c, M),
                         .b = poisoned(c, N),
                         .offsets = c.values({10}, kUneven.offsets, DType::i32),
                         .out = before,
                         .accumulate = accumulate});
      }
}

// relu and its gradient are those of the operators that do nothing else.
TEST(GroupedMatmul, TakesReluWithTheProduct) {
  Stream stream = Stream::immediate();
  for (bool backward : {false, true}) {
    Case c(17);
    const Shape rows = {12, 20};
    const GroupedMatmul plain{.a = c.normal({12, 7}),
                              .b = c.normal({3, 7, 20}),
                              .offsets = c.values({4}, {0, 4, 4, 9}, DType::i32),
                              .out = c.normal(rows)};
    GroupedMatmul both = plain;
    both.out = c.copy_of(plain.out);
    both.relu = !backward;
    if (backward) both.positive = c.normal(rows);
    run(stream, plain);
    run(stream, both);
    const Tensor count = grouped_rows(plain.offsets);
    if (backward)
      run(stream, ActivationBackward{
                      .x = both.positive, .dy = plain.out, .rows = count, .dx = plain.out});
    else
      run(stream, ActivationForward{.x = plain.out, .rows = count, .y = plain.out});
    expect_same_bits(plain.name, 0, both.out, plain.out);
  }
}

TEST(GroupedMatmul, BackendsAgreeWithRelu) {
  for (int64_t N : {13, 136, 517})
    for (DType dtype : {DType::f32, DType::bf16})
      for (int flags = 0; flags < 8; ++flags) {
        Case c(18);
        const bool b_transposed = flags & 1, gaps = flags & 2, backward = flags & 4;
        const int64_t K = 72;
        const Shape b = b_transposed ? Shape{9, N, K} : Shape{9, K, N}, out = {kUneven.rows, N};
        const auto rows = [&] { return gaps ? c.normal(out, 1, dtype) : dense(c, out, dtype); };
        expect_backends_agree(
            GroupedMatmul{.a = dense(c, {kUneven.rows, K}, dtype),
                          .b = gaps ? c.normal(b, 1, dtype) : dense(c, b, dtype),
                          .offsets = c.values({10}, kUneven.offsets, DType::i32),
                          .out = c.zeros(out, dtype),
                          .b_transposed = b_transposed,
                          .relu = !backward,
                          .positive = backward ? rows() : Tensor()});
      }
}

// More groups than a block has threads, most of them of other sizes than their neighbours.
TEST(GroupedMatmul, BackendsAgreeOnAThousandGroups) {
  std::vector<double> offsets = {0};
  for (int e = 0; e < 1024; ++e) offsets.push_back(offsets.back() + (e == 700 ? 300 : e % 4));
  const auto R = int64_t(offsets.back());
  for (DType dtype : {DType::f32, DType::bf16}) {
    Case c(14);
    const Tensor groups = c.values({1025}, offsets, DType::i32);
    const Tensor a = dense(c, {R, 16}, dtype), b = dense(c, {R, 24}, dtype);
    expect_backends_agree(GroupedMatmul{.a = a,
                                        .b = dense(c, {1024, 16, 24}, dtype),
                                        .offsets = groups,
                                        .out = c.zeros({R, 24}, dtype)});
    expect_backends_agree(
        GroupedOuter{.a = a, .b = b, .offsets = groups, .out = c.empty({1024, 16, 24})});
  }
}

TEST(GroupedOuter, DefinitionIsTheGradientOfGroupedMatmul) {
  Case c(8);
  const std::vector<int64_t> offsets = {0, 2, 2, 7};
  const int64_t N = 3, K = 4;
  const std::vector<double> a = to_doubles(c.normal({7, K})), b = to_doubles(c.normal({3, K, N}));
  const std::vector<double> dout = to_doubles(c.normal({7, N}));
  const auto loss = [&](const std::vector<double>& a, const std::vector<double>& b) {
    return weighted_sum(definition::grouped_matmul(a, b, offsets, N, K, false), dout);
  };
  expect_gradient("b", definition::grouped_outer(a, dout, offsets, K, N),
                  [&](const std::vector<double>& at) { return loss(a, at); }, b);
  expect_gradient("a", definition::grouped_matmul(dout, b, offsets, K, N, true),
                  [&](const std::vector<double>& at) { return loss(at, b); }, a);
}

TEST(GroupedMatmul, RefusesOffsetsThatDoNotAscendOrEndPastTheRows) {
  Stream stream = Stream::immediate();
  Case c(9);
  for (const std::vector<double>& offsets :
       {std::vector<double>{0, 5, 4}, {0, 2, 9}, {1, 2, 3}, {0, -1, 3}}) {
    const Tensor groups = c.values({3}, offsets, DType::i32);
    EXPECT_THROW(run(stream, GroupedMatmul{.a = c.normal({8, 2}),
                                           .b = c.normal({2, 2, 3}),
                                           .offsets = groups,
                                           .out = c.empty({8, 3})}),
                 Error);
    EXPECT_THROW(run(stream, GroupedOuter{.a = c.normal({8, 2}),
                                          .b = c.normal({8, 3}),
                                          .offsets = groups,
                                          .out = c.empty({2, 2, 3})}),
                 Error);
  }
}

}  // namespace
}  // namespace moemamba
