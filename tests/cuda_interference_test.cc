// A training gives the same bits whatever else the GPU does meanwhile. Without a GPU nothing is
// compared, and the last line says so.
#include <gtest/gtest.h>

#include <cstdio>
#include <optional>

#include "runtime/state_hash.h"
#include "tests/support/harness.h"
#include "tests/support/occupier.h"
#include "tests/support/training.h"

namespace moemamba {
namespace {

struct Trained {
  TrainingResult result;
  HashChain::Text chain;
  uint64_t state = 0;
  int64_t launches = 0;  // of the occupier
};

// 20 steps; `seed`: beside an occupier of this seed.
Trained train_beside(const TrainingCase& c, std::optional<uint64_t> seed) {
  Trained trained;
  std::optional<Occupier> occupier;
  if (seed) occupier.emplace(*seed);
  const TrainingHooks hooks{.wire = {}, .start = {}, .end = [&](Trainer& trainer) {
                              Session& session = trainer.session();
                              trained.state =
                                  state_hash(session.groups, session.compute, session.store);
                            }};
  trained.result = train(c, 1, 1, hooks);
  HashChain chain;
  for (const StepRecord& record : trained.result.records)
    chain.add({.step = record.step, .loss = record.loss, .grad_norm = record.grad_norm,
               .first_sample = record.step * c.batch, .samples = c.batch});
  trained.chain = chain.text();
  if (occupier) {
    trained.launches = occupier->launches();
    EXPECT_EQ(occupier->failure(), "");
  }
  return trained;
}

// Several waves of blocks in most kernels, top-2 of 8 experts, two micro-batches, both kinds of
// sequence layers.
TEST(CudaInterference, TrainingsGiveTheSameBitsBesideAKernelThatTakesMultiprocessors) {
  if (!other_backend()) {
    std::printf("no GPU: nothing is compared\n");
    return;
  }
  const TrainingCase c{.experts = 8, .top_k = 2, .width = 64, .hidden = 96, .batch = 16,
                       .micro_batch = 8, .length = 256, .device = DeviceKind::cuda,
                       .model = "compute_dtype: BF16 pattern: 'mamba, moe' "
                                "pattern: 'attention, feed_forward' positions: ROPE heads: 4"};
  const Trained alone = train_beside(c, std::nullopt);
  for (uint64_t seed : {1, 2}) {
    const Trained beside = train_beside(c, seed);
    EXPECT_GT(beside.launches, 50) << "there was hardly any disturbance";
    ASSERT_EQ(beside.result.records.size(), alone.result.records.size());
    for (size_t k = 0; k < alone.result.records.size(); ++k) {
      EXPECT_EQ(beside.result.records[k].loss, alone.result.records[k].loss) << "step " << k;
      EXPECT_EQ(beside.result.records[k].grad_norm, alone.result.records[k].grad_norm)
          << "step " << k;
      EXPECT_EQ(beside.result.counts[k], alone.result.counts[k]) << "step " << k;
    }
    EXPECT_EQ(beside.chain, alone.chain);
    EXPECT_EQ(beside.state, alone.state);
    std::printf("beside %d kernels of others: chain %.16s, loss %.4f to %.4f\n",
                int(beside.launches), beside.chain.data(),
                beside.result.records.front().loss, beside.result.records.back().loss);
    count_comparison();
  }
}

}  // namespace
}  // namespace moemamba
