#include "model/first_values.h"

#include <cmath>

namespace moemamba {

namespace {
using Kind = Initial::Kind;
Initial uniform(double fan_in, double divisor = 1) {
  return {Kind::uniform, 1 / std::sqrt(fan_in) / divisor};
}
}  // namespace

FirstValues::FirstValues(const ModelSizes& sizes)
    : recipe(sizes.init), scale(sizes.init_scale), residual_depth(double(sizes.layers())) {}

// The paper's code cuts at +-2 scale whatever the deviation, Switch at two deviations.
Initial FirstValues::normal(double variance) const {
  const double deviation = std::sqrt(variance);
  return {Kind::truncated_normal, deviation,
          recipe == ModelConfig::PAPER ? 2 * scale : 2 * deviation};
}

Initial FirstValues::embedding() const {
  if (recipe == ModelConfig::MAMBA_SSM) return {Kind::truncated_normal, 0.02, 0.16};
  return normal(scale);  // a fan-in of 1, so the paper's cut bites
}

Initial FirstValues::reads(int64_t fan_in) const {
  return recipe == ModelConfig::MAMBA_SSM ? uniform(double(fan_in))
                                          : normal(scale / double(fan_in));
}

Initial FirstValues::writes(int64_t fan_in, int64_t experts) const {
  if (recipe == ModelConfig::MAMBA_SSM) return linear_writes(fan_in);
  const bool paper = recipe == ModelConfig::PAPER;
  return normal(scale / double(paper ? experts * fan_in : fan_in));
}

Initial FirstValues::bias(int64_t fan_in) const {
  return recipe == ModelConfig::MAMBA_SSM ? Initial{} : uniform(double(fan_in));
}

Initial FirstValues::linear(int64_t fan_in) const {
  return uniform(double(fan_in));
}

Initial FirstValues::linear_writes(int64_t fan_in) const {
  return uniform(double(fan_in),
                 recipe == ModelConfig::MAMBA_SSM ? std::sqrt(residual_depth) : 1.0);
}

}  // namespace moemamba
