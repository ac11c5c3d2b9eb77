#include "model/config.h"

#include <cmath>

#include "core/error.h"

namespace moemamba {

int64_t ModelSizes::mamba_parameters() const {
  return D * 2 * I + I * W + I + I * (R + 2 * N) + R * I + I + I * N + I + I * D;
}

int64_t ModelSizes::parameters_total() const {
  const int64_t norm_parameters = norm == NormKind::layer ? 2 * D : D;
  int64_t per_block = mamba_parameters() + norm_parameters;
  if (E > 0) per_block += E * expert_parameters() + D * E + norm_parameters;
  return blocks * per_block + (final_norm ? norm_parameters : 0);
}

int64_t ModelSizes::parameters_active() const {
  return parameters_total() - (E > 0 ? blocks * (E - K) * expert_parameters() : 0);
}

double ModelSizes::matmul_flops_per_token() const {
  double weights = double(D * 2 * I + I * (R + 2 * N) + R * I + I * D);
  if (E > 0) weights += double(K * expert_parameters() + D * E);
  return 6.0 * (double(blocks) * weights + double(V * D));
}

ModelSizes model_sizes(const ModelConfig& c, int64_t vocabulary) {
  std::string problems;
  const auto require = [&](bool holds, const std::string& text) {
    if (!holds) problems += (problems.empty() ? "" : "\n") + text;
  };
  ModelSizes s{};
  s.V = c.vocabulary() ? c.vocabulary() : vocabulary;
  s.D = c.width();
  s.blocks = c.blocks();
  s.I = int64_t(c.expand() * double(s.D));
  s.N = c.state();
  s.R = c.dt_rank() ? c.dt_rank() : (s.D + 15) / 16;
  s.W = c.conv();
  s.E = c.experts();
  s.K = s.E > 0 ? c.top_k() : 0;
  s.F = c.expert_hidden() ? c.expert_hidden() : 3 * s.D;
  s.norm = c.norm() == ModelConfig::RMS_NORM ? NormKind::rms : NormKind::layer;
  s.norm_eps = float(c.norm_eps());
  s.final_norm = c.final_norm();
  s.activation = c.expert_activation();
  s.capacity_factor = float(c.capacity_factor());
  s.renormalise = c.renormalise();
  s.balance_loss = float(c.balance_loss());
  s.z_loss = float(c.z_loss());
  s.init_scale = float(c.init_scale());
  s.reset_at_documents = c.reset_at_documents();
  require(s.V > 0, "model.vocabulary: 0 means the tokenizer's, but there is no tokenizer; set it");
  require(
      !c.vocabulary() || !vocabulary || c.vocabulary() == vocabulary,
      concat("model.vocabulary: ", c.vocabulary(), ", but the tokenizer has ", vocabulary,
             " entries; leave it 0 to take the tokenizer's, or use the tokenizer that the model "
             "was trained with"));
  require(s.I >= 1, concat("model.expand: ", c.expand(), " x width ", s.D, " leaves no channel"));
  require(s.E == 0 || s.K <= s.E,
          concat("model.top_k: ", s.K, " experts per token, but there are ", s.E));
  check(problems.empty(), problems);
  return s;
}

}  // namespace moemamba
