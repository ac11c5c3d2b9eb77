#include <gtest/gtest.h>

#include <cstdio>

#include "tests/support/training.h"
#include "tests/support/wires.h"

namespace moemamba {
namespace {

// What equivalence_test is worth: its comparison, with one reduction left out at a time.

using Seat = std::unique_ptr<Communicator> ProcessGroups::*;

// A call that every step makes: `which` of the `period` calls of this kind in this group.
struct LeftOut {
  const char* what;
  Seat group;
  CallKind kind;
  int64_t period, which;
};

constexpr TrainingCase kCase{.experts = 6, .batch = 8, .steps = 6};
constexpr int kRanks = 4, kExpert = 2;
constexpr double kClear = 10 * kLossBound;  // what is left out must stand out

// Buckets become ready from the last block to the first; weights are gathered from the first to
// the last. Two blocks: head, block 1, block 0, embedding.
constexpr LeftOut kReductions[] = {
    {"gradient of the head", &ProcessGroups::data, CallKind::all_to_all, 4, 0},
    {"dense gradient of block 1", &ProcessGroups::data, CallKind::all_to_all, 4, 1},
    {"dense gradient of block 0", &ProcessGroups::data, CallKind::all_to_all, 4, 2},
    {"gradient of the embedding", &ProcessGroups::data, CallKind::all_to_all, 4, 3},
    {"expert gradient of block 1", &ProcessGroups::expert_data, CallKind::all_to_all, 2, 0},
    {"expert gradient of block 0", &ProcessGroups::expert_data, CallKind::all_to_all, 2, 1},
    {"weights of the embedding", &ProcessGroups::data, CallKind::all_gather, 4, 0},
    {"dense weights of block 0", &ProcessGroups::data, CallKind::all_gather, 4, 1},
    {"dense weights of block 1", &ProcessGroups::data, CallKind::all_gather, 4, 2},
    {"weights of the head", &ProcessGroups::data, CallKind::all_gather, 4, 3},
    {"expert weights of block 0", &ProcessGroups::expert_data, CallKind::all_gather, 2, 0},
    {"expert weights of block 1", &ProcessGroups::expert_data, CallKind::all_gather, 2, 1},
    // Loss, balance loss, choices and the gradient's norm travel in one call.
    {"facts of the step", &ProcessGroups::control, CallKind::all_gather, 1, 0},
};

TrainingResult train_without(const LeftOut& reduction) {
  ForgetfulWire* wires[kRanks] = {};
  const TrainingHooks hooks{
      .wire =
          [&](ProcessGroups& groups) {
            auto& seat = groups.*reduction.group;
            auto wire = std::make_unique<ForgetfulWire>(std::move(seat), reduction.kind,
                                                        reduction.period, reduction.which);
            wires[groups.rank] = wire.get();
            seat = std::move(wire);
          },
      .start = {},
      .end =
          [&](Trainer& trainer) {
            EXPECT_EQ(wires[trainer.session().groups.rank]->forgotten(), kCase.steps)
                << reduction.what << ": a step makes other calls than this test believes";
          }};
  return train(kCase, kRanks, kExpert, hooks);
}

TEST(Reductions, EachOfThemLeftOutMakesTheComparisonFail) {
  const TrainingResult reference = train(kCase, 1, 1);
  const TrainingResult whole = train(kCase, kRanks, kExpert);
  EXPECT_LE(difference(whole, reference).loss, kLossBound);
  for (const LeftOut& reduction : kReductions) {
    const TrainingDifference found = difference(train_without(reduction), reference);
    std::printf("without %s: worst %.1e, choices that differ %.0f\n", reduction.what, found.loss,
                found.choices);
    EXPECT_GT(found.loss, kClear) << reduction.what;
  }
}

}  // namespace
}  // namespace moemamba
