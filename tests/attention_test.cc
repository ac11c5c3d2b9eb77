#include "kernels/attention.h"

#include <gtest/gtest.h>

#include <cmath>

#include "kernels/cpu/simd/attention.h"
#include "tests/support/definitions/attention.h"
#include "tests/support/harness.h"

namespace moemamba {
namespace {

struct Sizes {
  int64_t B, L, H, Hkv, dh;
};
// Lengths: one, odd ones, a tile of queries and one past it, past a tile of keys.
constexpr Sizes kSizes[] = {{1, 1, 1, 1, 1},   {2, 7, 3, 1, 5},     {3, 2, 4, 2, 16},
                            {1, 128, 2, 2, 8}, {2, 65, 2, 1, 17},   {1, 372, 4, 2, 20},
                            {4, 1, 8, 8, 64},  {1, 257, 1, 1, 130}, {0, 0, 2, 1, 4}};
constexpr double kStarts[] = {0, 0.004, 0.1, 0.9};  // probabilities

struct AttentionCase {
  Case c;
  AttentionForward forward;
  AttentionBackward backward;

  AttentionCase(uint64_t seed, const Sizes& s, double starts, double size = 1) : c(seed) {
    const auto [B, L, H, Hkv, dh] = s;
    const int64_t T = B * L, columns = (H + 2 * Hkv) * dh;
    forward = {.qkv = c.normal({T, columns}, size),
               .starts = starts > 0 ? c.bytes({T}, starts) : Tensor(),
               .y = c.empty({T, H * dh}),
               .lse = c.empty({T, H}),
               .sequences = B,
               .heads = H,
               .kv_heads = Hkv};
    backward = {.qkv = forward.qkv,
                .starts = forward.starts,
                .y = forward.y,
                .lse = forward.lse,
                .dy = c.normal({T, H * dh}),
                .dqkv = c.empty({T, columns}),
                .sequences = B,
                .heads = H,
                .kv_heads = Hkv};
  }
  // The columns of q, k or v heads (0, 1, 2).
  Tensor part(const Tensor& qkv, int which) const {
    const int64_t dh = qkv.cols() / (forward.heads + 2 * forward.kv_heads);
    const int64_t ends[] = {0, forward.heads, forward.heads + forward.kv_heads,
                            forward.heads + 2 * forward.kv_heads};
    return qkv.column_range(ends[which] * dh, ends[which + 1] * dh);
  }
};

std::string to_string(const Sizes& s) {
  return concat("B", s.B, " L", s.L, " H", s.H, " Hkv", s.Hkv, " dh", s.dh);
}

// q, k and v apart, so that small gradients count beside large ones.
void expect_parts_close(const AttentionCase& test, const std::vector<double>& dqkv) {
  Case c(1);
  const Tensor expected = c.values(test.backward.dqkv.shape, dqkv, DType::f64);
  const char* names[] = {"dq", "dk", "dv"};
  const double size = std::sqrt(weighted_sum(dqkv, dqkv) / double(dqkv.size()));
  for (int which : {0, 1, 2}) {
    const Tensor found = test.part(test.backward.dqkv, which);
    const auto values = to_doubles(test.part(expected, which));
    // Where each token sees itself alone the gradients of q and k are zero, not small.
    if (std::sqrt(weighted_sum(values, values) / double(values.size())) > 1e-3 * size)
      expect_close(names[which], found, values);
  }
  expect_close("dqkv", test.backward.dqkv, dqkv);
}

TEST(Attention, MatchesItsDefinition) {
  Stream stream = Stream::immediate();
  for (const Sizes& s : kSizes)
    for (double starts : kStarts) {
      if (s.B == 0) continue;
      SCOPED_TRACE(concat(to_string(s), " starts ", starts));
      const AttentionCase test(1, s, starts);
      run(stream, test.forward);
      run(stream, test.backward);
      const definition::AttentionInput in(test.forward);
      const auto expected = definition::attention_forward(in);
      expect_close("y", test.forward.y, expected.y);
      expect_close("lse", test.forward.lse, expected.lse);
      expect_parts_close(test, definition::attention_backward(in, to_doubles(test.backward.dy)));
    }
}

TEST(Attention, DefinitionsBackwardIsItsGradient) {
  for (double starts : {0.0, 0.3})
    for (const Sizes& s : {Sizes{2, 5, 2, 1, 3}, Sizes{1, 4, 2, 2, 2}, Sizes{1, 3, 1, 1, 1}}) {
      const AttentionCase test(2, s, starts);
      const definition::AttentionInput in(test.forward);
      const std::vector<double> dy = to_doubles(test.backward.dy);
      const auto sum = [&](const std::vector<double>& at) {
        definition::AttentionInput moved = in;
        moved.qkv = at;
        return weighted_sum(definition::attention_forward(moved).y, dy);
      };
      expect_gradient("dqkv", definition::attention_backward(in, dy), sum, in.qkv);
    }
}

// Scores of some hundred: their exponentials overflow unless the greatest is taken off, also where
// it comes in a later tile of keys.
TEST(Attention, HoldsForLargeScores) {
  Stream stream = Stream::immediate();
  const AttentionCase test(3, {1, 600, 1, 1, 4}, 0, 12);
  run(stream, test.forward);
  run(stream, test.backward);
  const auto expected = definition::attention_forward(definition::AttentionInput(test.forward));
  EXPECT_GT(*std::max_element(expected.lse.begin(), expected.lse.end()), 200);
  EXPECT_LE(relative_error(to_doubles(test.forward.y), expected.y), 1e-4);  // 300 +- 2e-5 in f32
  for (double value : to_doubles(test.backward.dqkv)) ASSERT_TRUE(std::isfinite(value));
}

TEST(Attention, ShowsABrokenNumber) {
  Stream stream = Stream::immediate();
  for (int64_t place : {0, 150}) {
    const AttentionCase test(4, {1, 300, 1, 1, 4}, 0);
    test.forward.qkv.row<float>(place)[5] = NAN;  // a key: nobody before it sees it
    run(stream, test.forward);
    for (int64_t t = 0; t < 300; ++t)
      EXPECT_EQ(std::isnan(test.forward.y.row<float>(t)[0]), t >= place) << "token " << t;
  }
}

// Pieces of a sequence, one after the other with a cache, give the rows of the whole.
void expect_pieces_equal_the_whole(const Sizes& s, double starts, std::vector<int64_t> pieces) {
  SCOPED_TRACE(concat(to_string(s), " starts ", starts, " first piece ", pieces[0]));
  Stream stream = Stream::immediate();
  const AttentionCase test(5, s, starts);
  run(stream, test.forward);
  Case c(6);
  AttentionForward piece{.cache = c.empty({s.B, s.L + 2, 2 * s.Hkv * s.dh}),
                         .first = starts > 0 ? c.zeros({s.B}, DType::i32) : Tensor(),
                         .sequences = s.B,
                         .heads = s.H,
                         .kv_heads = s.Hkv};
  for (int64_t L : pieces) {
    const auto rows_of = [&](const Tensor& whole, const Tensor& part) {
      for (int64_t t = 0; t < s.B * L; ++t)
        copy(stream,
             whole.row_range(t / L * s.L + piece.filled + t % L,
                             t / L * s.L + piece.filled + t % L + 1),
             part.row_range(t, t + 1));
      return part;
    };
    piece.qkv = rows_of(test.forward.qkv, c.empty({s.B * L, test.forward.qkv.cols()}));
    if (starts > 0) {
      piece.starts = c.empty({s.B * L}, DType::u8);
      for (int64_t t = 0; t < s.B * L; ++t)
        piece.starts.as<uint8_t>()[t] =
            test.forward.starts.as<uint8_t>()[t / L * s.L + piece.filled + t % L];
    }
    piece.y = c.empty({s.B * L, s.H * s.dh});
    run(stream, piece);
    expect_close("y", piece.y, to_doubles(rows_of(test.forward.y, c.empty({s.B * L, s.H * s.dh}))));
    piece.filled += L;
  }
  EXPECT_EQ(piece.filled, s.L);
}

TEST(Attention, PiecesWithACacheEqualTheWhole) {
  for (double starts : {0.0, 0.1}) {
    expect_pieces_equal_the_whole({2, 9, 4, 2, 8}, starts, {1, 1, 1, 1, 1, 1, 1, 1, 1});
    expect_pieces_equal_the_whole({2, 372, 2, 1, 16}, starts, {7, 1, 130, 1, 1, 232});
    expect_pieces_equal_the_whole({1, 300, 1, 1, 64}, starts, {299, 1});
  }
}

TEST(Attention, RefusesWhatDoesNotFit) {
  Stream stream = Stream::immediate();
  const auto refused = [&](auto change) {
    AttentionCase test(7, {2, 3, 4, 2, 8}, 0.5);
    change(test);
    EXPECT_THROW(run(stream, test.forward), Error);
  };
  refused([](AttentionCase& test) { test.forward.kv_heads = 3; });
  refused([](AttentionCase& test) { test.forward.heads = 5; });
  refused([](AttentionCase& test) { test.forward.sequences = 4; });
  refused([](AttentionCase& test) { test.forward.filled = 1; });
  refused([](AttentionCase& test) { test.forward.lse = test.c.empty({6, 3}); });
  const auto with_cache = [](AttentionCase& test, int64_t filled, int first) {
    test.forward.cache = test.c.empty({2, 8, 32});
    test.forward.first = test.c.values({2}, {0.0, double(first)}, DType::i32);
    test.forward.filled = filled;
  };
  refused([&](AttentionCase& test) { with_cache(test, 6, 0); });  // full
  refused([&](AttentionCase& test) { with_cache(test, 3, 4); });  // begins beyond what is there
  refused([&](AttentionCase& test) {  // starts, and nobody remembers them
    with_cache(test, 3, 0);
    test.forward.first = {};
  });
}

TEST(Attention, SameBitsForAnyThreads) {
  for (const Sizes& s : kSizes)
    for (double starts : {0.0, 0.1}) {
      AttentionCase test(8, s, starts);
      expect_threads_agree(test.forward);
      expect_threads_agree(test.backward);
      test.forward.cache = test.c.normal({s.B, s.L + 5, 2 * s.Hkv * s.dh});
      test.forward.first = test.c.integers({s.B}, 0, 4);
      test.forward.filled = 4;
      expect_threads_agree(test.forward);
    }
}

// Heads as wide as a GPU's kernels and one past them; lengths past its tiles of queries.
constexpr Sizes kDeviceSizes[] = {{2, 64, 2, 1, 32},  {1, 130, 4, 2, 33}, {2, 16, 2, 2, 64},
                                  {1, 17, 3, 3, 128}, {1, 99, 2, 1, 256}, {1, 1134, 2, 1, 12}};

TEST(Attention, BothBackendsAgree) {
  std::vector<Sizes> sizes(std::begin(kSizes), std::end(kSizes));
  sizes.insert(sizes.end(), std::begin(kDeviceSizes), std::end(kDeviceSizes));
  for (const Sizes& s : sizes)
    for (double starts : {0.0, 0.02, 0.3})
      for (DType dtype : {DType::f32, DType::bf16}) {
        SCOPED_TRACE(concat(to_string(s), " starts ", starts, " ", name_of(dtype)));
        AttentionCase test(10, s, starts);
        Stream stream = Stream::immediate();
        run(stream, test.forward);
        auto& [c, forward, backward] = test;
        const bool aligned = dtype == DType::bf16;
        for (Tensor* tensor : {&forward.qkv, &forward.y, &backward.dy, &backward.dqkv})
          *tensor = c.copy_as(*tensor, dtype, aligned);
        backward.qkv = forward.qkv;
        backward.y = forward.y;
        expect_backends_agree(backward);
        expect_backends_agree(forward);
        forward.cache = c.normal({s.B, s.L + 5, 2 * s.Hkv * s.dh}, 1, dtype);
        forward.first = c.integers({s.B}, 0, 4);
        forward.filled = 4;
        forward.lse = {};
        expect_backends_agree(forward);
      }
}

// One token after many, as in decoding, without and with document starts.
TEST(Attention, BothBackendsAgreeWhenDecoding) {
  for (DType dtype : {DType::f32, DType::bf16})
    for (double starts : {0.0, 0.5}) {
      Case c(11);
      expect_backends_agree(AttentionForward{.qkv = c.normal({3, 8 * 20}, 1, dtype),
                                             .starts = starts > 0 ? c.bytes({3}, starts) : Tensor(),
                                             .y = c.empty({3, 4 * 20}, dtype),
                                             .cache = c.normal({3, 300, 4 * 20}, 1, dtype),
                                             .first = c.integers({3}, 0, 250),
                                             .sequences = 3,
                                             .heads = 4,
                                             .kv_heads = 2,
                                             .filled = 299});
    }
}

TEST(AttentionKernels, BothInstructionSetsGiveTheSameBits) {
  if (simd_level() != SimdLevel::avx512) GTEST_SKIP() << "this processor has AVX2 only";
  constexpr int64_t kWidth = 21;
  for (int64_t keys : {1, 7, 16, 33, 257})
    for (int64_t begin : {int64_t{0}, keys / 3}) {
      Case cases[2] = {Case(9), Case(9)};
      Tensor rows[2], numbers[2];
      for (SimdLevel level : {SimdLevel::avx2, SimdLevel::avx512}) {
        const AttentionKernels& kernels = attention_kernels(level);
        const Tensor out = cases[int(level)].normal({4, std::max(keys, kWidth)});
        const Tensor sums = cases[int(level)].values({3}, {0, 1, 0});  // greatest, sum, dot
        const auto row = [&](int64_t r) {
          return ScoreRow{out.row<float>(r), keys, begin, std::max(begin, keys - 1), 0.3f};
        };
        float* number = sums.as<float>();
        kernels.soften(row(0), number, number + 1, out.row<float>(1), kWidth);
        kernels.backward(row(2), out.row<float>(3), 0.7f, -0.2f);
        number[2] = kernels.dot(out.row<float>(0), out.row<float>(2), kWidth);
        kernels.scale(out.row<float>(1), 0.9f, kWidth);
        rows[int(level)] = out;
        numbers[int(level)] = sums;
      }
      expect_same_bits("attention kernels, rows", int(keys), rows[0], rows[1]);
      expect_same_bits("attention kernels, numbers", int(keys), numbers[0], numbers[1]);
    }
}

}  // namespace
}  // namespace moemamba
