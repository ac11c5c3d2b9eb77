#include "model/optimizer.h"

#include <algorithm>
#include <cmath>

#include "kernels/adamw.h"

namespace moemamba {

float learning_rate(const OptimizerSettings& s, int64_t step) {
  if (step < s.warmup_steps) return s.lr * float(step + 1) / float(s.warmup_steps);
  const double span = double(std::max<int64_t>(1, s.steps - 1 - s.warmup_steps));
  const double done = std::min(1.0, double(step - s.warmup_steps) / span);
  const double cosine = 0.5 * (1 + std::cos(M_PI * done));
  return float(s.lr * (s.final_lr_fraction + (1 - s.final_lr_fraction) * cosine));
}

Optimizer::Optimizer(const OptimizerSettings& settings, ParameterStore& store,
                     GradientBuckets& buckets)
    : settings_(settings), store_(store), buckets_(buckets) {}

void Optimizer::sum_of_squares(Stream& stream, Tensor sum) const {
  for (int64_t i = 0; i < buckets_.size(); ++i)
    run(stream, SumOfSquares{.x = buckets_.owned_gradient(i), .sum = sum, .accumulate = i > 0});
}

void Optimizer::update(Stream& stream, Tensor verdict, int64_t step) const {
  for (int64_t i = 0; i < buckets_.size(); ++i)
    run(stream, AdamW{.gradient = buckets_.owned_gradient(i),
                      .verdict = verdict,
                      .value = buckets_.owned_value(i),
                      .m = store_.moments(int(i), 0),
                      .v = store_.moments(int(i), 1),
                      .lr = learning_rate(settings_, step),
                      .beta1 = settings_.beta1,
                      .beta2 = settings_.beta2,
                      .eps = settings_.eps,
                      .decay = settings_.weight_decay,
                      .step = step + 1});
}

}  // namespace moemamba
