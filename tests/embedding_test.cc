#include "kernels/embedding.h"

#include <gtest/gtest.h>

#include "tests/support/definitions/embedding.h"
#include "tests/support/harness.h"

namespace moemamba {
namespace {

struct Sizes {
  int64_t T, V, D;
};
// Few tokens and many, few words and many; widths: one, a prime, two vectors, past two blocks.
constexpr Sizes kSizes[] = {{1, 1, 1}, {5, 3, 7}, {32, 257, 32}, {300, 11, 131}, {0, 4, 8}};

TEST(Embedding, MatchesItsDefinition) {
  Stream stream = Stream::immediate();
  for (auto [T, V, D] : kSizes) {
    Case c(1);
    const Tensor ids = c.integers({T}, 0, V - 1), table = c.normal({V, D});
    const Tensor dy = c.normal({T, D}), y = c.empty({T, D}), dtable = c.empty({V, D});
    run(stream, EmbeddingForward{.ids = ids, .table = table, .y = y});
    EXPECT_EQ(to_doubles(y),
              definition::embedding_forward(to_doubles(ids), to_doubles(table), size_t(D)));
    run(stream, EmbeddingBackward{.ids = ids, .dy = dy, .dtable = dtable});
    expect_close(
        "dtable", dtable,
        definition::embedding_backward(to_doubles(ids), to_doubles(dy), size_t(V), size_t(D)));
  }
}

TEST(Embedding, DefinitionsBackwardIsItsGradient) {
  Case c(2);
  const auto ids = to_doubles(c.integers({9}, 0, 3)), table = to_doubles(c.normal({4, 3}));
  const auto dy = to_doubles(c.normal({9, 3}));
  expect_gradient(
      "dtable", definition::embedding_backward(ids, dy, 4, 3),
      [&](const std::vector<double>& at) {
        return weighted_sum(definition::embedding_forward(ids, at, 3), dy);
      },
      table);
}

TEST(Embedding, AddsToItsGradientWhereAsked) {
  Stream stream = Stream::immediate();
  Case c(3);
  const Tensor ids = c.integers({50}, 0, 6), dy = c.normal({50, 13}), dtable = c.normal({7, 13});
  auto expected = definition::embedding_backward(to_doubles(ids), to_doubles(dy), 7, 13);
  const auto before = to_doubles(dtable);
  for (size_t i = 0; i < expected.size(); ++i) expected[i] += before[i];
  run(stream, EmbeddingBackward{.ids = ids, .dy = dy, .dtable = dtable, .accumulate = true});
  expect_close("dtable", dtable, expected);
}

// One word for all tokens, few and many words, runs of equal tokens that end on a border of the
// GPU's pieces and past it; whole packs, and widths that end within one.
constexpr Sizes kDeviceSizes[] = {{3000, 1, 16}, {5000, 2, 13},  {64, 1, 8},  {1134, 7, 40},
                                  {33, 1, 9},    {372, 50304, 8}, {7, 5, 520}, {2000, 97, 136}};

TEST(Embedding, BothBackendsAgree) {
  std::vector<Sizes> sizes(std::begin(kSizes), std::end(kSizes));
  sizes.insert(sizes.end(), std::begin(kDeviceSizes), std::end(kDeviceSizes));
  for (auto [T, V, D] : sizes)
    for (DType dtype : {DType::f32, DType::bf16})
      for (bool aligned : {false, true}) {
        SCOPED_TRACE(concat("T ", T, " V ", V, " D ", D, " ", name_of(dtype)));
        Case c(6);
        const Tensor ids = c.integers({T}, 0, V - 1), table = c.normal({V, D});
        const Tensor dy = c.copy_as(c.normal({T, D}), dtype, aligned);
        const Tensor y = c.copy_as(c.zeros({T, D}), dtype, aligned);
        for (DType table_dtype : {DType::f32, DType::bf16})
          expect_backends_agree(EmbeddingForward{
              .ids = ids, .table = c.copy_as(table, table_dtype, aligned), .y = y});
        EmbeddingBackward backward{
            .ids = ids, .dy = dy, .dtable = c.copy_as(table, DType::f32, aligned)};
        expect_backends_agree(backward);
        backward.accumulate = true;
        expect_backends_agree(backward);
      }
}

// A fifth of the tokens is one word, as in text.
TEST(Embedding, BothBackendsAgreeWhereOneWordIsFrequent) {
  Case c(7);
  const int64_t T = 6000, V = 300, D = 24;
  const Tensor ids = c.integers({T}, 0, V - 1), often = c.bytes({T}, 0.2);
  for (int64_t t = 0; t < T; ++t)
    if (often.as<uint8_t>()[t]) ids.as<int32_t>()[t] = 41;
  expect_backends_agree(
      EmbeddingBackward{.ids = ids, .dy = c.normal({T, D}), .dtable = c.empty({V, D})});
}

TEST(Embedding, SameBitsForAnyThreads) {
  for (auto [T, V, D] : kSizes) {
    Case c(4);
    const Tensor ids = c.integers({T}, 0, V - 1);
    const EmbeddingForward forward{.ids = ids, .table = c.normal({V, D}), .y = c.empty({T, D})};
    const EmbeddingBackward backward{.ids = ids, .dy = c.normal({T, D}), .dtable = c.empty({V, D})};
    expect_threads_agree(forward);
    expect_threads_agree(backward);
  }
}

TEST(Embedding, NamesTheTensorOfAWrongType) {
  Stream stream = Stream::immediate();
  Case c(5);
  try {
    run(stream,
        EmbeddingForward{.ids = c.normal({3}), .table = c.normal({2, 4}), .y = c.empty({3, 4})});
    FAIL() << "real ids were accepted";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("ids[T]: expected i32, found f32"), std::string::npos)
        << error.what();
  }
}

}  // namespace
}  // namespace moemamba
