#include "runtime/data.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <set>

#include "core/error.h"
#include "tests/support/temporary_folder.h"

namespace moemamba {
namespace {

constexpr int32_t kEnd = 9999;
constexpr int64_t kVocabulary = 10000;

using Layout = std::vector<std::vector<int64_t>>;  // document lengths of each file

// Counting files: token i of the whole text is i, but for the ends of documents.
class Text {
 public:
  // One file for each list of document lengths (without their ends).
  explicit Text(const Layout& layout, TokenFormat format = TokenFormat::megatron) {
    PosixFileSystem files;
    for (const auto& documents : layout) {
      paths_.push_back(folder_ / ("shard" + std::to_string(paths_.size())));
      TokenWriter writer(files, paths_.back(), format, kVocabulary);
      for (const int64_t length : documents) {
        std::vector<int32_t> ids(static_cast<size_t>(length));
        std::iota(ids.begin(), ids.end(), int32_t(tokens_.size()));
        ids.push_back(kEnd);
        tokens_.insert(tokens_.end(), ids.begin(), ids.end());
        writer.add_document(ids);
      }
      writer.commit();
    }
  }
  DataOptions options(int64_t length, int64_t batch, Sampling sampling = Sampling::epochs) const {
    return {.files = paths_,
            .vocabulary = kVocabulary,
            .end_of_document = kEnd,
            .sequence_length = length,
            .global_batch = batch,
            .seed = 42,
            .sampling = sampling};
  }
  const std::vector<int32_t>& tokens() const { return tokens_; }

 private:
  TemporaryFolder folder_;
  std::vector<std::string> paths_;
  std::vector<int32_t> tokens_;
};

struct Batch {
  std::vector<int32_t> inputs, targets;
  std::vector<uint8_t> starts;
  bool operator==(const Batch&) const = default;
};

Batch take(Batches& batches, int64_t step, int64_t first, int64_t count) {
  const auto size = size_t(count * batches.options().sequence_length);
  Batch batch{std::vector<int32_t>(size), std::vector<int32_t>(size), std::vector<uint8_t>(size)};
  batches.fill(step, first, count, batch.inputs.data(), batch.targets.data(), batch.starts.data());
  return batch;
}

void append(std::vector<int32_t>& to, const std::vector<int32_t>& from) {
  to.insert(to.end(), from.begin(), from.end());
}

TEST(Data, AnyNumberOfRanksSeesTheSameGlobalBatch) {
  const Text text({{100, 1, 57}, {300}, {0, 2, 41}});
  for (const Sampling sampling : {Sampling::epochs, Sampling::circular, Sampling::in_order}) {
    Batches whole(text.options(7, 12, sampling));
    for (const int64_t step : {0, 5, 1000}) {
      const Batch expected = take(whole, step, 0, 12);
      for (const int64_t ranks : {1, 2, 3, 5, 12}) {
        Batch all;
        for (int64_t rank = 0; rank < ranks; ++rank) {
          Batches own(text.options(7, 12, sampling));  // another process
          const int64_t begin = rank * 12 / ranks, end = (rank + 1) * 12 / ranks;
          const Batch part = take(own, step, begin, end - begin);
          append(all.inputs, part.inputs);
          append(all.targets, part.targets);
          all.starts.insert(all.starts.end(), part.starts.begin(), part.starts.end());
        }
        EXPECT_EQ(all, expected) << ranks << " ranks, step " << step;
      }
    }
  }
}

TEST(Data, EveryWindowComesOncePerEpochInAnOrderOfItsOwn) {
  const Text text({{500}, {470, 3}});  // 976 tokens
  Batches batches(text.options(13, 4));
  ASSERT_EQ(batches.windows(), 75);  // not a multiple of the batch: epochs end inside batches
  std::vector<std::vector<int64_t>> epochs(4);
  for (int64_t sample = 0; sample < 300; ++sample) {
    const Batch one = take(batches, sample / 4, sample % 4, 1);
    const int64_t at = std::find(text.tokens().begin(), text.tokens().end(), one.inputs[0]) -
                       text.tokens().begin();
    ASSERT_EQ(at % 13, 0);
    for (int64_t t = 0; t < 13; ++t) {
      EXPECT_EQ(one.inputs[size_t(t)], text.tokens()[size_t(at + t)]);
      EXPECT_EQ(one.targets[size_t(t)], text.tokens()[size_t(at + t + 1)]);
    }
    epochs[size_t(sample / 75)].push_back(at / 13);
  }
  std::set<std::vector<int64_t>> orders(epochs.begin(), epochs.end());
  EXPECT_EQ(orders.size(), 4u);
  for (auto& windows : epochs) {
    EXPECT_FALSE(std::is_sorted(windows.begin(), windows.end()));
    std::sort(windows.begin(), windows.end());
    for (int64_t w = 0; w < 75; ++w) EXPECT_EQ(windows[size_t(w)], w);
  }
  EXPECT_DOUBLE_EQ(batches.epoch(75), 4.0);
}

TEST(Data, AnotherSeedGivesAnotherOrder) {
  const Text text(Layout{{900}});
  auto options = text.options(8, 16);
  Batches one(options);
  options.seed = 43;
  Batches two(options);
  EXPECT_NE(take(one, 0, 0, 16), take(two, 0, 0, 16));
}

TEST(Data, StartsMarkFirstTokensOfDocuments) {
  const Text text({{3, 4}, {2, 6}});  // ends at 3, 8, 11, 18
  Batches batches(text.options(3, 1, Sampling::in_order));
  std::vector<uint8_t> starts;
  for (int64_t w = 0; w < batches.windows(); ++w) {
    const Batch one = take(batches, w, 0, 1);
    starts.insert(starts.end(), one.starts.begin(), one.starts.end());
  }
  std::vector<uint8_t> expected(18);
  for (const size_t start : {0, 4, 9, 12}) expected[start] = 1;
  EXPECT_EQ(starts, expected);
}

// Tokens of other tokenizers: no end-of-document id, and documents only in the index, if anywhere.
TEST(Data, StartsComeFromIndexAndFileBordersWhereNoIdEndsADocument) {
  TemporaryFolder folder;
  PosixFileSystem files;
  std::vector<std::string> paths;
  std::vector<uint8_t> expected;
  for (const TokenFormat format : {TokenFormat::megatron, TokenFormat::llmc}) {
    paths.push_back(folder / std::to_string(paths.size()));
    TokenWriter writer(files, paths.back(), format, 10);
    for (const size_t length : {3, 0, 5, 1}) {
      writer.add_document(std::vector<int32_t>(length, 7));
      expected.resize(expected.size() + length);
      const bool begins = format == TokenFormat::megatron || length == 3;  // llm.c has no index
      if (length > 0 && begins) *(expected.end() - int64_t(length)) = 1;
    }
    writer.commit();
  }
  for (const int64_t length : {1, 2, 4, 17}) {
    Batches batches({.files = paths,
                     .vocabulary = 10,
                     .sequence_length = length,
                     .global_batch = 1,
                     .sampling = Sampling::in_order});
    std::vector<uint8_t> starts;
    for (int64_t w = 0; w < batches.windows(); ++w) {
      const Batch one = take(batches, w, 0, 1);
      starts.insert(starts.end(), one.starts.begin(), one.starts.end());
    }
    EXPECT_EQ(starts,
              std::vector<uint8_t>(expected.begin(), expected.begin() + int64_t(starts.size())))
        << length;
  }
}

TEST(Data, PermutesEverySizeCompletely) {
  const Random random(1, "permutation");
  for (const uint64_t size : {1, 2, 3, 4, 5, 16, 17, 64, 1000, 1025}) {
    for (const uint64_t epoch : {0, 1, 1000000}) {
      std::vector<bool> seen(size);
      for (uint64_t i = 0; i < size; ++i) {
        const uint64_t at = permuted(random, epoch, size, i);
        ASSERT_LT(at, size);
        EXPECT_FALSE(seen[at]) << size;
        seen[at] = true;
      }
    }
  }
  EXPECT_LT(permuted(random, 3, uint64_t{1} << 50, 12345), uint64_t{1} << 50);
}

TEST(Data, PermutationsAreSpreadEvenly) {  // where element 0 of 10 lands over 5000 epochs
  const Random random(2, "permutation");
  std::map<uint64_t, int> places;
  for (uint64_t epoch = 0; epoch < 5000; ++epoch) ++places[permuted(random, epoch, 10, 0)];
  ASSERT_EQ(places.size(), 10u);
  for (const auto& [place, count] : places) EXPECT_NEAR(count, 500, 5 * 22) << place;
}

// What follows a token inside a crop: the next token of its document, or the end; after an end any
// document's first token.
TEST(Data, CircularCropsAreMadeOfDocuments) {
  for (const TokenFormat format : {TokenFormat::megatron, TokenFormat::llmc}) {
    const Text text({{5, 1, 0, 40}, {17, 3}}, format);
    std::set<int32_t> first, seen;
    for (size_t i = 0; i < text.tokens().size(); ++i)
      if ((i == 0 || text.tokens()[i - 1] == kEnd) && text.tokens()[i] != kEnd)
        first.insert(text.tokens()[i]);
    Batches batches(text.options(11, 3, Sampling::circular));
    for (int64_t step = 0; step < 300; ++step) {
      const Batch batch = take(batches, step, 0, 3);
      for (size_t i = 0; i < batch.inputs.size(); ++i) {
        const int32_t now = batch.inputs[i], next = batch.targets[i];
        seen.insert(now);
        if (now == kEnd) {
          EXPECT_TRUE(first.contains(next)) << next;
        } else {
          EXPECT_EQ(next, text.tokens()[size_t(now) + 1]);
        }
        if (i % 11 != 10) {
          EXPECT_EQ(batch.inputs[i + 1], next);
        }
        EXPECT_EQ(bool(batch.starts[i]), first.contains(now)) << now;
      }
    }
    EXPECT_EQ(seen.size(), 5u + 1 + 40 + 17 + 3 + 1);  // nothing is out of reach
  }
}

TEST(Data, RefusesTextTooShortForOneBatch) {
  const Text text(Layout{{30}});  // 31 tokens
  EXPECT_NO_THROW(Batches(text.options(10, 3)));
  EXPECT_NE(message_of([&] { Batches(text.options(10, 4)); }).find("at least 41"),
            std::string::npos);
  EXPECT_THROW(Batches(text.options(31, 1)), Error);
}

TEST(Data, NamesFileAndOffsetOfATokenOutsideTheVocabulary) {
  const Text text({{30}, {30}});
  auto options = text.options(10, 3, Sampling::in_order);
  options.vocabulary = 35;
  Batches batches(options);
  EXPECT_NO_THROW(take(batches, 0, 0, 2));
  const std::string message = message_of([&] { take(batches, 0, 2, 1); });
  EXPECT_NE(message.find("shard0.bin, token 30 (byte 60): token id 9999"), std::string::npos)
      << message;
}

}  // namespace
}  // namespace moemamba
