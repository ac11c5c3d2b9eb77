#pragma once
#include <functional>
#include <string>
#include <vector>

#include "runtime/trainer.h"

namespace moemamba {

// A small model and synthetic text to train it on, for tests of whole steps.
struct TrainingCase {
  int64_t experts = 5;  // 0: blocks are Mamba alone
  int64_t top_k = 1, blocks = 2, width = 24, hidden = 20, vocabulary = 61;
  int64_t batch = 4, micro_batch = 0, routing_group = 1, length = 12;
  double capacity_factor = 0, exchange_rows = 1.25;
  ModelConfig::Activation activation = ModelConfig::RELU;
  bool reset_at_documents = false;
  float lr = 1e-2f;
  int64_t steps = 20;
  int threads = 1;
  float z_loss = 0;
  DeviceKind device = DeviceKind::cpu;
  const char* model = "";  // further fields of ModelConfig, as text; they win
};
TrainerOptions trainer_options(const TrainingCase& c);

struct TrainingResult {
  std::vector<StepRecord> records;          // of rank 0
  std::vector<std::vector<double>> counts;  // of every step: choices by layer and expert
  bool ranks_agree = true;                  // all ranks reported the same losses and gradient norms
};
// What a test changes on every rank, each with that rank's own object; either may be empty.
struct TrainingHooks {
  std::function<void(ProcessGroups&)> wire;  // before the trainer is made
  std::function<void(Trainer&)> start;       // before step 0
  std::function<void(Trainer&)> end;         // after the last step, when the weights are there
};
// Trains on `ranks` threads.
TrainingResult train(const TrainingCase& c, int ranks, int expert, const TrainingHooks& hooks = {});

// Stated bound of the f32 losses of 20 steps between layouts (docs/testing.md): sums over ranks,
// micro-batches and tiles are added in another order, nothing else differs. Worst seen: 2.2e-7,
// over all cases and six of OpenBLAS' sets of kernels.
constexpr double kLossBound = 5e-6;

// How far apart two trainings are.
struct TrainingDifference {
  double loss = 0;     // worst relative difference of a step's loss
  double choices = 0;  // (token, expert) choices that differ, over all steps
};
TrainingDifference difference(const TrainingResult& a, const TrainingResult& b);

// Every layout of 2 to `most_ranks` ranks that holds `experts` experts: (ranks, expert ranks).
std::vector<std::pair<int, int>> layouts(int most_ranks, int64_t experts);

// A token file that a small model learns something of in twenty steps: low ids are more frequent,
// and half of all tokens follow from the one before. Written once per process, gone at its end.
std::string synthetic_tokens(int64_t vocabulary);

}  // namespace moemamba
