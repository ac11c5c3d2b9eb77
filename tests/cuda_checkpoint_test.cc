// Checkpoints of a GPU's trainer. Without a GPU nothing is compared, and the last line says so.
#include <gtest/gtest.h>

#include "runtime/checkpoint_reader.h"
#include "runtime/checkpoints.h"
#include "runtime/state_hash.h"
#include "tests/support/harness.h"
#include "tests/support/in_world.h"
#include "tests/support/temporary_folder.h"
#include "tests/support/training.h"

namespace moemamba {
namespace {

constexpr const char* kModels[] = {
    "pattern: 'mamba, moe'",
    "pattern: 'mamba, moe' router: SIGMOID router_bias_rate: 0.01 renormalise: true top_k: 2",
    "pattern: 'attention, feed_forward' pattern: 'mamba, moe' positions: LEARNED heads: 3"};

TrainingCase case_of(const char* model, DeviceKind device) {
  return {.experts = 6, .batch = 4, .lr = 3e-3f, .device = device, .model = model};
}

struct Trained {
  std::vector<StepRecord> records;
  uint64_t hash = 0;
};

// One rank: from the run's newest checkpoint, if it has any, to step `last`, with checkpoints after
// the steps `saves` while later ones go on.
Trained train_run(const TrainingCase& c, const std::string& run, int64_t last,
                  const std::vector<int64_t>& saves, bool asynchronous = true) {
  Trained trained;
  in_world(RankLayout(1, 1, int(c.experts)), [&](ProcessGroups& groups) {
    groups.device = c.device;
    PosixFileSystem files;
    Trainer trainer(groups, trainer_options(c));
    Session& session = trainer.session();
    const auto found =
        load_newest(files, groups, session.host, session.store, {.run = run, .generation = 1});
    const int64_t first = found ? found->step() : 0;
    if (found) {
      EXPECT_EQ(state_hash(groups, session.compute, session.store), found->state_hash());
    }
    Checkpoints checkpoints(files, groups, session.store,
                            {.writer = {.run = run, .generation = 1, .may_write = {}},
                             .asynchronous = asynchronous,
                             .retention = {.keep_last = 100}});
    for (int64_t k = first; k < last; ++k) {
      trained.records.push_back(trainer.step(k));
      if (std::find(saves.begin(), saves.end(), k + 1) == saves.end()) continue;
      trainer.wait_weights();
      trainer.hold_state(checkpoints.save(
          {.step = k + 1, .next_sample = (k + 1) * c.batch, .loss = trained.records.back().loss},
          &session.compute));
    }
    checkpoints.finish();
    EXPECT_EQ(checkpoints.failed(), 0);
    trained.hash = state_hash(groups, session.compute, session.store);
  });
  return trained;
}

uint64_t saved_hash(const std::string& run) {
  return Checkpoint(list_checkpoints(run).front().path).manifest().facts().state_hash();
}

TEST(CudaCheckpoint, WhatAGpuSavesAmidItsStepsTheCpuLoadsBitForBitAndBack) {
  if (!other_backend()) return;
  for (const char* model : kModels) {
    SCOPED_TRACE(model);
    TemporaryFolder folder;
    const std::string run = folder / "run";
    const Trained gpu = train_run(case_of(model, DeviceKind::cuda), run, 4, {2, 3, 4});
    EXPECT_EQ(saved_hash(run), gpu.hash) << "later steps got into an earlier copy";
    train_run(case_of(model, DeviceKind::cpu), run, 4, {});  // loads: compares the hashes
    const Trained cpu = train_run(case_of(model, DeviceKind::cpu), run, 7, {7});
    EXPECT_EQ(saved_hash(run), cpu.hash);
    train_run(case_of(model, DeviceKind::cuda), run, 7, {});
    count_comparison();
  }
}

TEST(CudaCheckpoint, AResumedRunHasTheBitsOfOneThatWasNotStopped) {
  if (!other_backend()) return;
  for (const char* compute : {"", " compute_dtype: BF16"}) {
    const std::string model = concat(kModels[0], compute);
    SCOPED_TRACE(model);
    TemporaryFolder folder;
    const TrainingCase c = case_of(model.c_str(), DeviceKind::cuda);
    const Trained whole = train_run(c, folder / "whole", 8, {});
    train_run(c, folder / "parts", 5, {5}, false);
    const Trained rest = train_run(c, folder / "parts", 8, {});
    EXPECT_EQ(rest.hash, whole.hash);
    ASSERT_EQ(rest.records.size(), 3u);
    for (size_t k = 0; k < 3; ++k) {
      EXPECT_EQ(rest.records[k].loss, whole.records[5 + k].loss);
      EXPECT_EQ(rest.records[k].grad_norm, whole.records[5 + k].grad_norm);
    }
    count_comparison();
  }
}

}  // namespace
}  // namespace moemamba
