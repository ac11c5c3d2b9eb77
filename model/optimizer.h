#pragma once
#include "model/parameters.h"

namespace moemamba {

struct OptimizerSettings {
  float lr, final_lr_fraction;
  int64_t warmup_steps, steps;
  float beta1, beta2, eps, weight_decay, grad_clip;
};

// Linear warm-up, lr (step + 1) / warmup, then a cosine from lr to final_lr_fraction lr at the
// last step. step counts from 0.
float learning_rate(const OptimizerSettings& settings, int64_t step);

// AdamW over the slices that this rank owns, of every bucket.
class Optimizer {
 public:
  Optimizer(const OptimizerSettings& settings, ParameterStore& store, GradientBuckets& buckets);
  // sum [1] f64: the squares of this rank's slices of the reduced gradient. Over all ranks every
  // element is counted once.
  void sum_of_squares(Stream& stream, Tensor sum) const;
  // verdict [2]: clip factor, and 0 where nothing may change. step counts from 0.
  void update(Stream& stream, Tensor verdict, int64_t step) const;
  const OptimizerSettings& settings() const { return settings_; }

 private:
  OptimizerSettings settings_;
  ParameterStore& store_;
  GradientBuckets& buckets_;
};

}  // namespace moemamba
