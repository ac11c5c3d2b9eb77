#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <mutex>

#include "tests/support/in_world.h"
#include "tests/support/training.h"
#include "tests/support/wires.h"

namespace moemamba {
namespace {

// Every token's first choice becomes expert 0: the norm before the router now gives every row a
// large sum, which expert 0 likes more than the others' small weights can.
void favour_expert_zero(Trainer& trainer) {
  for (const Parameter& p : trainer.session().store.parameters()) {
    const bool bias = p.name.ends_with("moe_norm.bias");
    if (!bias && !p.name.ends_with("moe.router.weight")) continue;
    std::fill_n(p.value.row<float>(0), p.value.cols(), 1.0f);
  }
}

struct Flood {
  TrainingCase c;
  int64_t layers, tokens;
  TrainingResult train(int ranks, int expert, double exchange_rows) const {
    TrainingCase with = c;
    with.exchange_rows = exchange_rows;
    const TrainingHooks hooks{
        .wire = {}, .start = favour_expert_zero, .end = [&](Trainer& trainer) {
          const Session& session = trainer.session();
          EXPECT_EQ(session.arena.peak(), session.arena.capacity())
              << "rank " << session.groups.rank << " of " << ranks << ": not what was planned";
          const bool floods = exchange_rows < ranks && expert > 1;
          EXPECT_EQ(session.exchange.chunks() > 1, floods);
        }};
    return moemamba::train(with, ranks, expert, hooks);
  }
};

TEST(Dropless, EveryTokenToOneExpertIsRightInThePlannedMemory) {
  for (int64_t top_k : {1, 2}) {
    const Flood flood{
        .c = {.experts = 8, .top_k = top_k, .batch = 8, .steps = 4}, .layers = 2, .tokens = 8 * 12};
    const TrainingResult reference = flood.train(1, 1, 1.25);
    for (const auto& counts : reference.counts)
      for (int64_t layer = 0; layer < flood.layers; ++layer)
        ASSERT_EQ(counts[size_t(layer * 8)], double(flood.tokens)) << "the flood is none";
    for (auto [ranks, expert] : {std::pair{1, 1}, {2, 1}, {2, 2}, {4, 2}, {4, 4}})
      for (double exchange_rows : {1.25, 1e6}) {
        const TrainingResult result = flood.train(ranks, expert, exchange_rows);
        const TrainingDifference found = difference(result, reference);
        EXPECT_LE(found.loss, kLossBound) << ranks << " ranks, exchange_rows " << exchange_rows;
        EXPECT_EQ(found.choices, 0);
        EXPECT_EQ(result.records.back().dropped_rows, 0);
      }
  }
}

TEST(Memory, IsWhatWasPlannedWhateverTheRouting) {
  const TrainingHooks hooks{.wire = {}, .start = {}, .end = [](Trainer& trainer) {
                              const Arena& arena = trainer.session().arena;
                              EXPECT_EQ(arena.peak(), arena.capacity());
                            }};
  for (double exchange_rows : {0.2, 1.0, 1.25})
    train({.experts = 5,
           .top_k = 2,
           .batch = 7,
           .micro_batch = 1,
           .exchange_rows = exchange_rows,
           .steps = 3},
          3, 3, hooks);
}

// What every rank threw, as PeerLost or as another Error.
struct Endings {
  std::vector<std::string> lost, failed;
};

Endings train_with_failure(int ranks, int expert, const TrainingCase& c,
                           const std::function<void(ProcessGroups&)>& wire) {
  Endings endings;
  std::mutex mutex;
  const TrainerOptions options = trainer_options(c);
  std::vector<ProcessGroups> groups =
      make_thread_groups(RankLayout(ranks, expert, int(c.experts)), std::chrono::seconds(60));
  in_threads(ranks, [&](int rank) {
    try {
      wire(groups[size_t(rank)]);
      Trainer trainer(groups[size_t(rank)], options);
      for (int64_t k = 0; k < c.steps; ++k) trainer.step(k);
      trainer.wait_weights();
    } catch (const PeerLost& error) {
      std::lock_guard lock(mutex);
      endings.lost.push_back(error.what());
    } catch (const Error& error) {
      std::lock_guard lock(mutex);
      endings.failed.push_back(error.what());
    }
  });
  return endings;
}

TEST(Failure, OfOneRankAmidAStepEndsTheOthersWhichNameIt) {
  // A forward pass of two blocks plans twice, and either pass moves rows four times (twice for each
  // further chunk): the movement numbered 14 is in the backward pass of step 1, when the reduction
  // of the head's gradient is on its way.
  constexpr std::pair<CallKind, int64_t> kCalls[] = {{CallKind::all_gather, 0},
                                                     {CallKind::all_gather, 3},
                                                     {CallKind::all_to_all, 7},
                                                     {CallKind::all_to_all, 14}};
  for (const auto& [failing, number] : kCalls) {
    const auto start = std::chrono::steady_clock::now();
    const Endings endings = train_with_failure(
        4, 2, {.experts = 4, .batch = 8, .steps = 3},
        [failing = failing, number = number](ProcessGroups& groups) {
          if (groups.rank != 2) return;
          groups.expert = std::make_unique<WatchedWire>(
              std::move(groups.expert), [failing, number](CallKind kind, int64_t n) {
                check(kind != failing || n != number, "the disk of this rank is full");
              });
        });
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(30))
        << "somebody waited for a deadline";
    ASSERT_EQ(endings.failed.size(), 1u);
    EXPECT_NE(endings.failed[0].find("disk of this rank"), std::string::npos);
    ASSERT_EQ(endings.lost.size(), 3u);
    for (const std::string& what : endings.lost)
      EXPECT_NE(what.find("rank 2: stopped: the disk of this rank is full"), std::string::npos)
          << what;
  }
}

TEST(Failure, OfTheCommunicationStreamComesOutOfTheStep) {
  const Endings endings =
      train_with_failure(2, 1, {.experts = 4, .batch = 4, .steps = 3}, [](ProcessGroups& groups) {
        if (groups.rank != 1) return;
        groups.data = std::make_unique<WatchedWire>(
            std::move(groups.data),
            [](CallKind kind, int64_t n) { check(kind != CallKind::all_to_all || n != 5, "cut"); });
      });
  ASSERT_EQ(endings.failed.size(), 1u);
  ASSERT_EQ(endings.lost.size(), 1u);
  EXPECT_NE(endings.lost[0].find("rank 1: stopped: cut"), std::string::npos) << endings.lost[0];
}

TEST(Step, ThatIsNotFiniteChangesNothingOnAnyRank) {
  const TrainingCase c{.experts = 4, .batch = 4, .steps = 1};
  const TrainerOptions options = trainer_options(c);
  in_world(RankLayout(2, 2, 4), [&](ProcessGroups& groups) {
    Trainer trainer(groups, options);
    const Parameter& head = trainer.session().store.parameters().back();
    ASSERT_EQ(head.name, "head.weight");
    if (groups.rank == 1) head.value.row<float>(0)[0] = NAN;  // not in the part that rank 1 owns
    std::vector<float> before;
    for (const Parameter& p : trainer.session().store.parameters())
      before.insert(before.end(), p.value.row<float>(0),
                    p.value.row<float>(0) + p.value.elements());
    trainer.step(0);
    EXPECT_TRUE(trainer.skipped());
    trainer.wait_weights();
    size_t i = 0;
    for (const Parameter& p : trainer.session().store.parameters())
      for (int64_t e = 0; e < p.value.elements(); ++e, ++i) {
        if (std::isnan(before[i])) continue;
        ASSERT_EQ(p.value.row<float>(0)[e], before[i]) << p.name;
      }
  });
}

TEST(LearningRate, WarmsUpAndEndsAtItsLastFraction) {
  const OptimizerSettings s{.lr = 1, .final_lr_fraction = 0.1f, .warmup_steps = 4, .steps = 20};
  EXPECT_FLOAT_EQ(learning_rate(s, 0), 0.25f);
  EXPECT_FLOAT_EQ(learning_rate(s, 3), 1);
  EXPECT_FLOAT_EQ(learning_rate(s, 4), 1);
  EXPECT_FLOAT_EQ(learning_rate(s, 19), 0.1f);
  for (int64_t k = 4; k < 19; ++k) EXPECT_GT(learning_rate(s, k), learning_rate(s, k + 1));
}

}  // namespace
}  // namespace moemamba
