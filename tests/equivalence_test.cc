#include <gtest/gtest.h>

#include <cstdio>
#include <map>
#include <optional>

#include "tests/support/training.h"

namespace moemamba {
namespace {

void expect_equal_training(const TrainingCase& c, int ranks, int expert,
                           const TrainingResult& reference) {
  const TrainingResult result = train(c, ranks, expert);
  const TrainingDifference found = difference(result, reference);
  std::printf(
      "experts %lld top-%lld batch %lld micro %lld, ranks %d expert %d: worst %.1e, "
      "choices that differ %.0f\n",
      (long long)c.experts, (long long)c.top_k, (long long)c.batch, (long long)c.micro_batch, ranks,
      expert, found.loss, found.choices);
  EXPECT_TRUE(result.ranks_agree);
  EXPECT_LE(found.loss, kLossBound);
  EXPECT_EQ(found.choices, 0);
}

TrainingResult learnt(const TrainingCase& c) {
  const TrainingResult reference = train(c, 1, 1);
  double before = 0, after = 0;
  for (size_t k = 0; k < 5; ++k) {
    before += reference.records[k].ce / 5;
    after += reference.records[reference.records.size() - 1 - k].ce / 5;
  }
  std::printf("one rank: cross-entropy from %.3f to %.3f\n", before, after);
  EXPECT_LT(after, 0.9 * before) << "it does not learn";
  return reference;
}

void expect_all_layouts(const TrainingCase& c) {
  const TrainingResult reference = learnt(c);
  for (auto [ranks, expert] : layouts(4, c.experts))
    expect_equal_training(c, ranks, expert, reference);
}

// The case with `times` micro-batches a step, empty ones included, on each of `ranks` ranks; none
// where a rank's share cannot be cut into as many.
std::optional<TrainingCase> accumulated(TrainingCase c, int ranks, int64_t times) {
  const int64_t share = (c.batch + ranks - 1) / ranks;
  c.micro_batch = (share + times - 1) / times;
  if ((share + c.micro_batch - 1) / c.micro_batch != times) return {};
  return c;
}

TEST(Equivalence, TopOneTrainsTheSameOnEveryLayout) {
  expect_all_layouts({.batch = 16});
}
TEST(Equivalence, TopTwoTrainsTheSameOnEveryLayout) {
  expect_all_layouts({.top_k = 2, .batch = 13, .activation = ModelConfig::SWIGLU});
}
TEST(Equivalence, FortyTwoExpertsTrainTheSameOnEveryLayout) {
  expect_all_layouts({.experts = 42, .batch = 13});
  expect_all_layouts({.experts = 42, .top_k = 2, .batch = 16});
}
TEST(Equivalence, FewerSequencesThanRanksTrainTheSame) {
  expect_all_layouts({.experts = 4, .batch = 3});
}
TEST(Equivalence, CapacityDropsTheSameRowsOnEveryLayout) {
  expect_all_layouts({.experts = 6, .batch = 16, .routing_group = 2, .capacity_factor = 1});
}
TEST(Equivalence, DocumentStartsResetOnEveryLayout) {
  expect_all_layouts({.experts = 4, .batch = 8, .reset_at_documents = true, .z_loss = 1e-3f});
}
TEST(Equivalence, AccumulationChangesNothingButRounding) {
  // Shares of four ranks: 4 sequences of 13 or 16, which make no three micro-batches, and 5 of 20.
  std::map<std::pair<int, int64_t>, int> compared;  // by ranks and micro-batches
  for (const TrainingCase& whole : {TrainingCase{.batch = 13},
                                    {.experts = 42, .top_k = 2, .batch = 16},
                                    {.experts = 42, .batch = 20}}) {
    const TrainingResult reference = train(whole, 1, 1);
    std::vector<std::pair<int, int>> all = layouts(4, whole.experts);
    all.emplace_back(1, 1);
    for (int64_t times : {1, 2, 3})
      for (auto [ranks, expert] : all)
        if (const auto c = accumulated(whole, ranks, times)) {
          expect_equal_training(*c, ranks, expert, reference);
          ++compared[{ranks, times}];
        }
  }
  for (int ranks : {1, 2, 3, 4})
    for (int64_t times : {1, 2, 3})
      EXPECT_GT((compared[{ranks, times}]), 0) << times << " micro-batches on " << ranks;
}
TEST(Equivalence, SmallExchangeBuffersCostTimeAlone) {
  const TrainingCase whole{.experts = 5, .top_k = 2, .batch = 8};
  const TrainingResult reference = train(whole, 1, 1);
  for (double rows : {0.1, 0.4, 1.0, 4.0}) {
    TrainingCase c = whole;
    c.exchange_rows = rows;
    expect_equal_training(c, 1, 1, reference);
    expect_equal_training(c, 4, 4, reference);
  }
}

}  // namespace
}  // namespace moemamba
