#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/norm.h"
#include "kernels/pointwise.h"
#include "model/model_config.pb.h"

namespace moemamba {

enum class LayerKind : uint8_t { mamba, inner_moe, attention, feed_forward, moe };
const char* name_of(LayerKind kind);  // as in model.pattern

// The layers behind one norm; several stand side by side and are added.
using SubLayerPlan = std::vector<LayerKind>;
using BlockPlan = std::vector<SubLayerPlan>;

// What stands between the matrices of a feed-forward network; gated: three of them (SwiGLU).
struct FeedForwardKind {
  Activation activation = Activation::relu;
  bool gated = false;
  int64_t matrices() const { return gated ? 3 : 2; }
};

// All sizes of a model, derived once from its settings. Letters as in docs/operators.md.
struct ModelSizes {
  int64_t V, D, blocks;            // vocabulary, width, blocks
  std::vector<BlockPlan> pattern;  // block i has pattern[i mod size]
  NormKind norm;
  bool post_norm;
  float norm_eps;
  bool final_norm;

  int64_t I, N, R, W;  // Mamba: inner width, states, dt rank, conv width
  bool mamba_norms;    // RMSNorm on dt, B, C

  int64_t E, K, F;  // experts (0: no router in the pattern), experts per token, hidden width
  FeedForwardKind expert;
  double capacity_factor;
  bool renormalise;
  bool sigmoid_router;
  float router_bias_rate, routed_scale;
  float balance_loss, z_loss;
  int64_t shared_hidden;  // 0: no shared expert

  bool projection_experts[3];  // by ModelConfig::Projection
  bool linear_projections;     // linear experts under one router
  int64_t projection_hidden;

  int64_t H, Hkv, dh;  // attention: heads, key/value heads, width of a head
  bool attention_bias;
  ModelConfig::Positions positions;
  int64_t learned_positions;  // rows of the table; 0: none
  double rope_base;

  int64_t feed_forward_hidden;
  FeedForwardKind feed_forward;
  bool feed_forward_bias;

  ModelConfig::Initialisation init;
  float init_scale;
  bool reset_at_documents;
  DType compute;  // of activations and of the weights that products read: f32 or bf16

  const BlockPlan& block(int64_t i) const { return pattern[size_t(i) % pattern.size()]; }
  int64_t layers() const;                // of all kinds
  int64_t layers(LayerKind kind) const;  // of one
  // Routing decisions that a token meets: one a MoE layer, one for each projection that consists
  // of experts (one in all where these are linear).
  int64_t routers() const;
  int64_t routers_of_inner_moe() const;
  std::string pattern_text() const;  // "mamba, moe" or "mamba | mamba, moe"

  // FLOPs of forward and backward per token: 6 per weight of a product that the token meets, the
  // head's included; the scan and pointwise work are not counted.
  double matmul_flops_per_token() const;
  // Of attention's scores and their products, in sequences of `length` tokens (half are masked).
  double attention_flops_per_token(int64_t length) const;
};

// A setting that cannot be, for people. setting: "model.top_k".
struct ModelProblem {
  std::string setting, text;
};
// Every contradiction of the settings at once. length: of a training sequence, 0 = not known.
std::vector<ModelProblem> model_problems(const ModelConfig& config);

// Whether any layer of the pattern has experts.
bool has_routers(const ModelConfig& config);

// Throws an Error that names every contradiction. vocabulary: the tokenizer's, used where the
// settings leave it 0 and compared where they do not. length: of a sequence; rows of a table of
// learned positions.
ModelSizes model_sizes(const ModelConfig& config, int64_t vocabulary, int64_t length = 0);

}  // namespace moemamba
