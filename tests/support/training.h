#pragma once
#include <string>
#include <vector>

#include "runtime/trainer.h"

namespace moemamba {

// A small model and synthetic text to train it on, for tests of whole steps.
struct TrainingCase {
  int64_t experts = 5, top_k = 1, blocks = 2, width = 24, hidden = 20, vocabulary = 61;
  int64_t batch = 4, micro_batch = 0, routing_group = 1, length = 12;
  double capacity_factor = 0, exchange_rows = 1.25;
  ModelConfig::ExpertActivation activation = ModelConfig::RELU;
  bool reset_at_documents = false;
  float lr = 1e-2f;
  int64_t steps = 20;
  int threads = 1;
  float z_loss = 0;
};
TrainerOptions trainer_options(const TrainingCase& c);

struct TrainingResult {
  std::vector<StepRecord> records;
  std::vector<std::vector<double>> counts;  // of every step
};
// Trains on `ranks` threads; the records of rank 0 (all ranks' are compared: they must be equal).
TrainingResult train(const TrainingCase& c, int ranks, int expert);

// A token file of learnable text (a noisy second-order pattern), written once per process.
std::string synthetic_tokens(int64_t vocabulary);

}  // namespace moemamba
