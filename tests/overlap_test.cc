#include <gtest/gtest.h>

#include <array>
#include <atomic>

#include "tests/support/training.h"
#include "tests/support/wires.h"

namespace moemamba {
namespace {

// Wires so slow that a call of the communication stream ends only after a certain point of the
// compute stream has been passed. A trainer that waited for the call first would never pass it.
//
// Points are counted by the dispatches of the expert exchange, which the compute stream makes
// itself: a step of three blocks dispatches rows of blocks 0, 1, 2 on its way forward and gradients
// of 2, 1, 0 backward. Each is followed by a combine; there is room for all rows in one chunk.

constexpr int64_t kBlocks = 3, kPoints = 2 * kBlocks, kSteps = 3;
constexpr TrainingCase kCase{
    .experts = 6, .blocks = kBlocks, .batch = 8, .exchange_rows = 2, .steps = kSteps};

// One rank's points; dispatch `i` of step k is number k * kPoints + i.
struct Points {
  std::array<Milestone, size_t(kSteps* kPoints)> dispatched;
  std::atomic<int> waits{0}, in_vain{0};

  void wait_for(int64_t point) {
    ++waits;
    if (!dispatched[size_t(point)].wait()) ++in_vain;
  }
};

void watch(std::unique_ptr<Communicator>& seat, WatchedWire::Watcher before) {
  seat = std::make_unique<WatchedWire>(std::move(seat), std::move(before));
}

void watch_dispatches(ProcessGroups& groups, Points& points) {
  watch(groups.expert, [&points](CallKind kind, int64_t n) {
    if (kind == CallKind::all_to_all && n % 2 == 0) points.dispatched[size_t(n / 2)].reach();
  });
}

void expect_training(int ranks, int expert, const TrainingHooks& hooks) {
  const TrainingResult result = train(kCase, ranks, expert, hooks);
  const TrainingResult undisturbed = train(kCase, ranks, expert);
  EXPECT_EQ(difference(result, undisturbed).loss, 0);
}

TEST(Overlap, BlockBelowStartsItsBackwardBeforeTheReductionOfABlockEnds) {
  constexpr int kRanks = 4, kExpert = 2;
  std::array<Points, kRanks> of_ranks;
  const auto wire = [&](ProcessGroups& groups) {
    Points& points = of_ranks[size_t(groups.rank)];
    watch_dispatches(groups, points);
    // Dense gradients: head, blocks 2, 1, 0, embedding. Experts': blocks 2, 1, 0.
    watch(groups.data, [&points](CallKind kind, int64_t n) {
      const int64_t step = n / (kBlocks + 2), place = n % (kBlocks + 2);
      if (kind == CallKind::all_to_all && place < kBlocks)
        points.wait_for(step * kPoints + kBlocks + place);
    });
    watch(groups.expert_data, [&points](CallKind kind, int64_t n) {
      const int64_t step = n / kBlocks, place = n % kBlocks;
      if (kind == CallKind::all_to_all && place + 1 < kBlocks)
        points.wait_for(step * kPoints + kBlocks + place + 1);
    });
  };
  expect_training(kRanks, kExpert, {.wire = wire});
  for (const Points& points : of_ranks) {
    EXPECT_EQ(points.waits, kSteps * (kBlocks + kBlocks - 1));
    EXPECT_EQ(points.in_vain, 0) << "the backward pass waited for a reduction";
  }
}

TEST(Overlap, BlockStartsTheNextForwardPassBeforeTheWeightsAboveAreGathered) {
  constexpr int kRanks = 2;
  std::array<Points, kRanks> of_ranks;
  const auto wire = [&](ProcessGroups& groups) {
    Points& points = of_ranks[size_t(groups.rank)];
    watch_dispatches(groups, points);
    // Weights: embedding, blocks 0, 1, 2, head. Nothing follows the last step.
    watch(groups.data, [&points](CallKind kind, int64_t n) {
      const int64_t step = n / (kBlocks + 2), place = n % (kBlocks + 2);
      if (kind == CallKind::all_gather && place >= 2 && step + 1 < kSteps)
        points.wait_for((step + 1) * kPoints + place - 2);
    });
  };
  expect_training(kRanks, kRanks, {.wire = wire});
  for (const Points& points : of_ranks) {
    EXPECT_EQ(points.waits, (kSteps - 1) * kBlocks);
    EXPECT_EQ(points.in_vain, 0) << "the forward pass waited for more than its own weights";
  }
}

}  // namespace
}  // namespace moemamba
