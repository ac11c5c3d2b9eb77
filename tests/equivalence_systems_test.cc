#include <gtest/gtest.h>

#include <cstdio>

#include "tests/support/systems.h"
#include "tests/support/training.h"

namespace moemamba {
namespace {

// Ranks 1, 2 and 4 with every size of the expert group that divides them.
constexpr std::pair<int, int> kLayouts[] = {{2, 1}, {2, 2}, {4, 1}, {4, 2}, {4, 4}};

TEST(Equivalence, EverySystemTrainsTheSameOnEveryLayout) {
  for (const System& system : kSystems) {
    SCOPED_TRACE(system.name);
    TrainingCase c{.batch = 8, .routing_group = 2, .model = system.model};
    const TrainingResult reference = train(c, 1, 1);
    EXPECT_LT(reference.records.back().ce, reference.records.front().ce) << "it does not learn";
    double worst = 0;
    for (auto [ranks, expert] : kLayouts) {
      SCOPED_TRACE(concat(ranks, " ranks, expert ", expert));
      const TrainingResult result = train(c, ranks, expert);
      const TrainingDifference found = difference(result, reference);
      EXPECT_TRUE(result.ranks_agree);
      EXPECT_LE(found.loss, kLossBound);
      EXPECT_EQ(found.choices, 0);
      worst = std::max(worst, found.loss);
    }
    std::printf("%-40s loss %.4f to %.4f, worst %.1e\n", system.name,
                reference.records.front().loss, reference.records.back().loss, worst);
  }
}

TEST(Equivalence, FortyTwoInnerExpertsAndRatiosTrainTheSame) {
  for (const char* model :
       {"pattern: 'inner_moe' projections: CONV projections: OUTPUT projection_hidden: 5",
        "pattern: 'mamba, moe' expand: 1.3333333 expert_hidden: 12",
        "pattern: 'inner_moe' projections: GATE projections: OUTPUT projection_experts: LINEAR "
        "top_k: 2"}) {
    SCOPED_TRACE(model);
    TrainingCase c{.experts = 42, .batch = 8, .model = model};
    const TrainingResult reference = train(c, 1, 1);
    for (auto [ranks, expert] : {std::pair{4, 4}, {4, 2}, {3, 3}}) {
      const TrainingDifference found = difference(train(c, ranks, expert), reference);
      EXPECT_LE(found.loss, kLossBound) << ranks << " ranks, expert " << expert;
      EXPECT_EQ(found.choices, 0) << ranks << " ranks, expert " << expert;
    }
  }
}

TEST(Equivalence, SmallExchangeBuffersCostEverySystemTimeAlone) {
  for (const System& system : kSystems) {
    SCOPED_TRACE(system.name);
    TrainingCase c{.batch = 4, .steps = 5, .model = system.model};
    const TrainingResult reference = train(c, 1, 1);
    c.exchange_rows = 0.3;
    for (auto [ranks, expert] : {std::pair{1, 1}, {2, 2}})
      EXPECT_LE(difference(train(c, ranks, expert), reference).loss, kLossBound);
  }
}

// A router's bias is a state of all ranks: it must follow the whole batch's choices.
TEST(Equivalence, RouterBiasesBalanceTheExperts) {
  TrainingCase c{.batch = 8, .steps = 60, .model = "router_bias_rate: 0.02 balance_loss: 0"};
  const auto imbalance = [](const TrainingResult& result) {
    double sum = 0;
    for (size_t k = result.records.size() - 10; k < result.records.size(); ++k)
      sum += result.records[k].load_max_over_mean / 10;
    return sum;
  };
  const double with_bias = imbalance(train(c, 2, 2));
  c.model = "balance_loss: 0";
  const double without = imbalance(train(c, 2, 2));
  std::printf("load max over mean: %.2f with biases, %.2f without\n", with_bias, without);
  EXPECT_LT(with_bias, without);
}

}  // namespace
}  // namespace moemamba
