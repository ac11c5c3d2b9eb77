// Whole trainings on a GPU beside the same on the CPU. Without a GPU nothing is compared, and the
// last line says so.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>

#include "tests/support/harness.h"
#include "tests/support/systems.h"
#include "tests/support/training.h"

namespace moemamba {
namespace {

// f32 against f32: other orders of sums, other exponentials. Choices may flip where two logits are
// that close; a flip moves the loss of a model this small by more than the bound, so none may.
constexpr double kDeviceBound = 1e-4;
// bf16 against f32, absolute: the bound, in nats.
constexpr double kBf16Bound = 0.02;

TrainingResult train_on_gpu(TrainingCase c) {
  c.device = DeviceKind::cuda;
  return train(c, 1, 1);
}

std::string with(const char* model, const char* more) { return concat(model, " ", more); }

double worst_ce(const TrainingResult& a, const TrainingResult& b) {
  double worst = 0;
  for (size_t k = 0; k < a.records.size(); ++k)
    worst = std::max(worst, std::abs(a.records[k].ce - b.records[k].ce));
  return worst;
}

void expect_same_records(const TrainingResult& a, const TrainingResult& b) {
  ASSERT_EQ(a.records.size(), b.records.size());
  for (size_t k = 0; k < a.records.size(); ++k) {
    EXPECT_EQ(a.records[k].loss, b.records[k].loss) << "step " << k;
    EXPECT_EQ(a.records[k].grad_norm, b.records[k].grad_norm) << "step " << k;
  }
}

TEST(CudaTraining, EverySystemTrainsAsOnTheCpu) {
  if (!other_backend()) return;
  for (const System& system : kSystems) {
    SCOPED_TRACE(system.name);
    const TrainingCase c{.batch = 8, .routing_group = 2, .model = system.model};
    const TrainingResult cpu = train(c, 1, 1), gpu = train_on_gpu(c);
    const TrainingDifference found = difference(gpu, cpu);
    EXPECT_LE(found.loss, kDeviceBound);
    EXPECT_EQ(found.choices, 0);
    std::printf("%-40s loss %.4f to %.4f, worst %.1e\n", system.name, gpu.records.front().loss,
                gpu.records.back().loss, found.loss);
    count_comparison();
  }
}

TEST(CudaTraining, EverySystemTrainsInBf16AndGivesTheSameBitsTwice) {
  if (!other_backend()) return;
  for (const System& system : kSystems) {
    SCOPED_TRACE(system.name);
    const std::string model = with(system.model, "compute_dtype: BF16");
    TrainingCase c{.batch = 8, .routing_group = 2, .lr = 3e-3f, .model = system.model};
    const TrainingResult exact = train_on_gpu(c);
    c.model = model.c_str();
    const TrainingResult first = train_on_gpu(c), second = train_on_gpu(c);
    expect_same_records(first, second);
    const double worst = worst_ce(first, exact);
    EXPECT_LE(worst, kBf16Bound);
    std::printf("%-40s bf16 within %.1e of f32\n", system.name, worst);
    count_comparison();
  }
}

TEST(CudaTraining, AccumulationSmallBuffersAndFortyTwoExpertsTrainTheSame) {
  if (!other_backend()) return;
  const TrainingCase cases[] = {
      {.batch = 6, .micro_batch = 2},
      {.experts = 42, .top_k = 2, .batch = 6, .micro_batch = 4, .exchange_rows = 0.3},
      {.experts = 42, .batch = 8, .activation = ModelConfig::SWIGLU},
      {.experts = 1, .exchange_rows = 0.5},
      {.batch = 3, .length = 7, .reset_at_documents = true, .z_loss = 0.01f},
  };
  for (const TrainingCase& c : cases) {
    SCOPED_TRACE(&c - cases);
    const TrainingDifference found = difference(train_on_gpu(c), train(c, 1, 1));
    EXPECT_LE(found.loss, kDeviceBound);
    EXPECT_EQ(found.choices, 0);
    count_comparison();
  }
}

}  // namespace
}  // namespace moemamba
