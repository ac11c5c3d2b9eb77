#pragma once

namespace moemamba {

// Every system of docs/models.md at a size for tests: fields of ModelConfig, as text.
struct System {
  const char* name;
  const char* model;
};
constexpr System kSystems[] = {
    {"transformer, rotary", "pattern: 'attention, feed_forward' positions: ROPE heads: 4"},
    {"transformer, learned positions",
     "pattern: 'attention, feed_forward' positions: LEARNED heads: 3 attention_bias: true"},
    {"transformer-moe", "pattern: 'attention, moe' positions: ROPE capacity_factor: 1"},
    {"mamba", "pattern: 'mamba'"},
    {"mamba-mlp", "pattern: 'mamba, feed_forward' feed_forward_hidden: 72"},
    {"moe-mamba", "pattern: 'mamba, moe' capacity_factor: 1"},
    {"parallel moe-mamba", "pattern: 'mamba + moe'"},
    {"inner moe, conv", "pattern: 'inner_moe' projections: CONV projection_hidden: 9"},
    {"inner moe, gate, every other layer",
     "pattern: 'mamba' pattern: 'inner_moe' projections: GATE projection_hidden: 9"},
    {"inner moe, output", "pattern: 'inner_moe' projections: OUTPUT projection_hidden: 9"},
    {"inner moe, all three",
     "pattern: 'inner_moe' projections: CONV projections: GATE projections: OUTPUT "
     "projection_hidden: 9 capacity_factor: 1"},
    {"ratio 1:5", "pattern: 'mamba, moe' expand: 0.6666666 expert_hidden: 40"},
    {"ratio 5:1", "pattern: 'mamba, moe' expand: 3.3333333 expert_hidden: 8"},
    {"mixtral",
     "pattern: 'attention, moe' positions: ROPE heads: 6 kv_heads: 2 norm: RMS_NORM "
     "final_norm: true expert_activation: SWIGLU top_k: 2 renormalise: true"},
    {"jamba",
     "pattern: 'mamba, feed_forward' pattern: 'mamba, moe' mamba_norms: true norm: RMS_NORM "
     "final_norm: true expert_activation: SWIGLU feed_forward_activation: SWIGLU "
     "feed_forward_bias: false top_k: 2"},
    {"routing mamba",
     "pattern: 'inner_moe' projections: CONV projections: GATE projections: OUTPUT "
     "projection_experts: LINEAR"},
    {"sigmoid router, bias, shared expert",
     "pattern: 'mamba, moe' router: SIGMOID router_bias_rate: 0.01 renormalise: true "
     "routed_scale: 2.5 top_k: 2 shared_hidden: 16 expert_activation: SWIGLU"},
    {"post-norm hybrid",
     "pattern: 'mamba, moe' pattern: 'attention, feed_forward' norm_place: POST positions: ROPE "
     "reset_at_documents: true feed_forward_activation: GELU init: MAMBA_SSM"},
};

}  // namespace moemamba
