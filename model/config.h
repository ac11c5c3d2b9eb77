#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/norm.h"
#include "model/model_config.pb.h"

namespace moemamba {

// All sizes of a model, derived once from its settings. Letters as in docs/operators.md.
struct ModelSizes {
  int64_t V, D, blocks;  // vocabulary, width, blocks of (Mamba, MoE)
  int64_t I, N, R, W;    // Mamba: inner width, states, dt rank, conv width
  int64_t E, K, F;       // experts, experts per token, hidden width of an expert
  NormKind norm;
  float norm_eps;
  bool final_norm;
  ModelConfig::ExpertActivation activation;
  float capacity_factor;
  bool renormalise;
  float balance_loss, z_loss, init_scale;
  bool reset_at_documents;

  bool gated() const { return activation == ModelConfig::SWIGLU; }
  int64_t moe_layers() const { return E > 0 ? blocks : 0; }
  int64_t expert_parameters() const { return (gated() ? 3 : 2) * D * F; }
  int64_t mamba_parameters() const;
  int64_t parameters_total() const;   // without embedding and head
  int64_t parameters_active() const;  // of these, used by one token
  // Matrix-multiplication FLOPs of forward and backward per token: 6 per weight of a product,
  // the head's included; the scan and pointwise work are not counted.
  double matmul_flops_per_token() const;
};

// Throws an Error that names every contradiction at once. vocabulary: the tokenizer's, used where
// the settings leave it 0 and compared where they do not.
ModelSizes model_sizes(const ModelConfig& config, int64_t vocabulary);

}  // namespace moemamba
