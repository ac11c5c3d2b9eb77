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

TEST(Embedding, SameBitsForAnyThreadsAndOnBothBackends) {
  for (auto [T, V, D] : kSizes) {
    Case c(4);
    const Tensor ids = c.integers({T}, 0, V - 1);
    const EmbeddingForward forward{.ids = ids, .table = c.normal({V, D}), .y = c.empty({T, D})};
    const EmbeddingBackward backward{.ids = ids, .dy = c.normal({T, D}), .dtable = c.empty({V, D})};
    expect_threads_agree(forward);
    expect_backends_agree(forward);
    expect_threads_agree(backward);
    expect_backends_agree(backward);
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
