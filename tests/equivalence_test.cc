#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>

#include "tests/support/training.h"

namespace moemamba {
namespace {

// Stated bound of f32 losses over 20 steps between layouts (docs/testing.md): sums over ranks,
// micro-batches and tiles are added in another order, nothing else differs.
constexpr double kBound = 2e-5;

void expect_equal_training(const TrainingCase& c, int ranks, int expert,
                           const TrainingResult& reference) {
  const TrainingResult result = train(c, ranks, expert);
  double worst = 0;
  double flips = 0;
  for (size_t k = 0; k < result.records.size(); ++k) {
    worst = std::max(worst, std::abs(result.records[k].loss - reference.records[k].loss) /
                                reference.records[k].loss);
    for (size_t i = 0; i < result.counts[k].size(); ++i)
      flips += std::abs(result.counts[k][i] - reference.counts[k][i]) / 2;
  }
  std::printf(
      "experts %lld top-%lld batch %lld micro %lld, ranks %d expert %d: worst %.1e, "
      "choices that differ %.0f\n",
      (long long)c.experts, (long long)c.top_k, (long long)c.batch, (long long)c.micro_batch, ranks,
      expert, worst, flips);
  EXPECT_LE(worst, kBound);
}

void expect_all_layouts(const TrainingCase& c) {
  const TrainingResult reference = train(c, 1, 1);
  double before = 0, after = 0;
  for (size_t k = 0; k < 5; ++k) {
    before += reference.records[k].ce;
    after += reference.records[reference.records.size() - 1 - k].ce;
  }
  EXPECT_LT(after, 0.99 * before) << "it does not learn";
  for (auto [ranks, expert] : {std::pair{2, 1}, {2, 2}, {3, 1}, {3, 3}, {4, 1}, {4, 2}, {4, 4}})
    expect_equal_training(c, ranks, expert, reference);
}

TEST(Equivalence, TopOneTrainsTheSameOnEveryLayout) {
  expect_all_layouts({.batch = 16});
}
TEST(Equivalence, TopTwoTrainsTheSameOnEveryLayout) {
  expect_all_layouts({.top_k = 2, .batch = 13, .activation = ModelConfig::SWIGLU});
}
TEST(Equivalence, FortyTwoExpertsTrainTheSameOnEveryLayout) {
  expect_all_layouts({.experts = 42, .top_k = 2, .batch = 16, .micro_batch = 2});
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
  const TrainingCase whole{.experts = 42, .batch = 12};
  const TrainingResult reference = train(whole, 1, 1);
  for (int64_t micro : {12, 6, 4}) {
    TrainingCase c = whole;
    c.micro_batch = micro;
    expect_equal_training(c, 1, 1, reference);
    expect_equal_training(c, 2, 2, reference);
  }
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
