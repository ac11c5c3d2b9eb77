#include "model/config.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "model/pattern.h"

namespace moemamba {

namespace {

FeedForwardKind kind_of(ModelConfig::Activation activation) {
  switch (activation) {
    case ModelConfig::GELU:
      return {Activation::gelu, false};
    case ModelConfig::SILU:
      return {Activation::silu, false};
    case ModelConfig::SWIGLU:
      return {Activation::silu, true};
    default:
      return {Activation::relu, false};
  }
}

// The patterns that can be read; the others are model_problems' to name.
std::vector<BlockPlan> patterns(const ModelConfig& c) {
  std::vector<BlockPlan> plans;
  for (const std::string& text : c.pattern())
    if (PatternText read = read_pattern(text); read.problem.empty())
      plans.push_back(std::move(read.plan));
  if (c.pattern_size() == 0) plans.push_back(read_pattern("mamba, moe").plan);
  return plans;
}

bool any_has(const std::vector<BlockPlan>& plans, std::initializer_list<LayerKind> kinds) {
  return std::any_of(plans.begin(), plans.end(), [&](const BlockPlan& plan) {
    return std::any_of(kinds.begin(), kinds.end(),
                       [&](LayerKind kind) { return count_in(plan, kind) > 0; });
  });
}

class Problems {
 public:
  void require(bool holds, const char* setting, const std::string& text) {
    if (!holds) list.push_back({setting, text});
  }
  std::vector<ModelProblem> list;
};

void judge_pattern(const ModelConfig& c, const std::vector<BlockPlan>& plans, Problems& problems) {
  for (const std::string& text : c.pattern()) {
    const PatternText read = read_pattern(text);
    problems.require(read.problem.empty(), "model.pattern", read.problem);
    for (const SubLayerPlan& layers : read.plan) {
      const auto mixes = [&](LayerKind kind) {
        return kind == LayerKind::mamba || kind == LayerKind::inner_moe;
      };
      problems.require(layers.size() < 2 || !read.problem.empty() ||
                           std::any_of(layers.begin(), layers.end(), mixes),
                       "model.pattern",
                       concat("\"", text,
                              "\": layers side by side need a mamba or inner_moe layer among "
                              "them; try \"mamba + moe\""));
    }
  }
  problems.require(c.pattern_size() <= c.blocks(), "model.pattern",
                   concat(c.pattern_size(), " patterns take turns, but model.blocks is ",
                          c.blocks(), ": the last ones would never stand"));
  if (int(plans.size()) < c.pattern_size()) return;  // what else there is cannot be known
  const bool inner = any_has(plans, {LayerKind::inner_moe});
  problems.require(!inner || c.projections_size() > 0, "model.projections",
                   "an inner_moe layer (model.pattern) needs to know which projections consist of "
                   "experts: CONV, GATE, OUTPUT or several of them");
  problems.require(inner || c.projections_size() == 0, "model.projections",
                   "belongs to an inner_moe layer, but model.pattern has none; put one there, or "
                   "leave this out");
}

void judge_routing(const ModelConfig& c, const std::vector<BlockPlan>& plans, Problems& problems) {
  if (!any_has(plans, {LayerKind::moe, LayerKind::inner_moe})) return;
  problems.require(
      c.top_k() <= c.experts(), "model.top_k",
      concat("must be at most the ", c.experts(), " experts (model.experts), found ", c.top_k()));
  problems.require(c.router_bias_rate() == 0 || c.capacity_factor() == 0, "model.router_bias_rate",
                   "a bias balances the experts of a dropless model; set model.capacity_factor to "
                   "0, or this");
  problems.require(c.shared_hidden() == 0 || any_has(plans, {LayerKind::moe}),
                   "model.shared_hidden",
                   "a shared expert belongs to a moe layer, but model.pattern has none; set it 0");
}

void judge_attention(const ModelConfig& c, const std::vector<BlockPlan>& plans,
                     Problems& problems) {
  const bool attention = any_has(plans, {LayerKind::attention});
  const int kv = c.kv_heads() ? c.kv_heads() : c.heads();
  const int head_width = c.head_width() ? c.head_width() : c.width() / c.heads();
  if (attention) {
    problems.require(c.head_width() > 0 || c.width() % c.heads() == 0, "model.heads",
                     concat(c.heads(), " heads do not divide the width ", c.width(),
                            " (model.width); take a divisor, or set model.head_width"));
    problems.require(c.heads() % kv == 0, "model.kv_heads",
                     concat("must divide the ", c.heads(), " heads (model.heads), found ", kv));
    problems.require(c.positions() != ModelConfig::ROPE || head_width % 2 == 0, "model.positions",
                     concat("rotary positions turn pairs, but a head is ", head_width,
                            " wide; take an even model.head_width or other model.heads"));
  }
  problems.require(attention || c.positions() != ModelConfig::ROPE, "model.positions",
                   "rotary positions belong to attention, but model.pattern has no attention "
                   "layer; take NONE");
}

}  // namespace

std::vector<ModelProblem> model_problems(const ModelConfig& c) {
  Problems problems;
  const std::vector<BlockPlan> plans = patterns(c);
  judge_pattern(c, plans, problems);
  const bool readable = c.pattern_size() == 0 || int(plans.size()) == c.pattern_size();
  if (readable) {
    judge_routing(c, plans, problems);
    judge_attention(c, plans, problems);
  }
  problems.require(int64_t(c.expand() * double(c.width())) >= 1, "model.expand",
                   concat(c.expand(), " x width ", c.width(), " leaves no channel"));
  return problems.list;
}

bool has_routers(const ModelConfig& c) {
  return any_has(patterns(c), {LayerKind::moe, LayerKind::inner_moe});
}

ModelSizes model_sizes(const ModelConfig& c, int64_t vocabulary, int64_t length) {
  std::string problems;
  const auto require = [&](bool holds, const std::string& text) {
    if (!holds) problems += (problems.empty() ? "" : "\n") + text;
  };
  for (const ModelProblem& p : model_problems(c)) require(false, p.setting + ": " + p.text);
  ModelSizes s{};
  s.V = c.vocabulary() ? c.vocabulary() : vocabulary;
  s.D = c.width();
  s.blocks = c.blocks();
  s.pattern = patterns(c);
  s.norm = c.norm() == ModelConfig::RMS_NORM ? NormKind::rms : NormKind::layer;
  s.post_norm = c.norm_place() == ModelConfig::POST;
  s.norm_eps = c.norm_eps();
  s.final_norm = c.final_norm();
  s.I = int64_t(c.expand() * double(s.D));
  s.N = c.state();
  s.R = c.dt_rank() ? c.dt_rank() : (s.D + 15) / 16;
  s.W = c.conv();
  s.mamba_norms = c.mamba_norms();
  const bool routes = has_routers(c);
  s.E = routes ? c.experts() : 0;
  s.K = routes ? c.top_k() : 0;
  s.F = c.expert_hidden() ? c.expert_hidden() : 3 * s.D;
  s.expert = kind_of(c.expert_activation());
  s.capacity_factor = c.capacity_factor();
  s.renormalise = c.renormalise();
  s.sigmoid_router = c.router() == ModelConfig::SIGMOID;
  s.router_bias_rate = c.router_bias_rate();
  s.routed_scale = c.routed_scale();
  s.balance_loss = c.balance_loss();
  s.z_loss = c.z_loss();
  s.shared_hidden = c.shared_hidden();
  for (int projection : c.projections()) s.projection_experts[projection] = true;
  s.linear_projections = c.projection_experts() == ModelConfig::LINEAR;
  s.projection_hidden = c.projection_hidden();
  s.H = c.heads();
  s.Hkv = c.kv_heads() ? c.kv_heads() : c.heads();
  s.dh = c.head_width() ? c.head_width() : s.D / s.H;
  s.attention_bias = c.attention_bias();
  s.positions = c.positions();
  s.learned_positions = c.positions() == ModelConfig::LEARNED ? length : 0;
  s.rope_base = c.rope_base();
  s.feed_forward_hidden = c.feed_forward_hidden() ? c.feed_forward_hidden() : 4 * s.D;
  s.feed_forward = kind_of(c.feed_forward_activation());
  s.feed_forward_bias = c.feed_forward_bias();
  s.init = c.init();
  s.init_scale = c.init_scale();
  s.reset_at_documents = c.reset_at_documents();
  s.compute = c.compute_dtype() == ModelConfig::BF16 ? DType::bf16 : DType::f32;
  require(s.V > 0, "model.vocabulary: 0 means the tokenizer's, but there is no tokenizer; set it");
  require(
      !c.vocabulary() || !vocabulary || c.vocabulary() == vocabulary,
      concat("model.vocabulary: ", c.vocabulary(), ", but the tokenizer has ", vocabulary,
             " entries; leave it 0 to take the tokenizer's, or use the tokenizer that the model "
             "was trained with"));
  require(s.positions != ModelConfig::LEARNED || length > 0,
          "model.positions: LEARNED needs the length of a sequence (train.sequence_length)");
  check(problems.empty(), problems);
  return s;
}

int64_t ModelSizes::layers(LayerKind kind) const {
  int64_t count = 0;
  for (int64_t i = 0; i < blocks; ++i) count += count_in(block(i), kind);
  return count;
}

int64_t ModelSizes::layers() const {
  int64_t count = 0;
  for (int64_t i = 0; i < blocks; ++i)
    for (const SubLayerPlan& together : block(i)) count += int64_t(together.size());
  return count;
}

int64_t ModelSizes::routers_of_inner_moe() const {
  if (linear_projections) return 1;
  return std::count(std::begin(projection_experts), std::end(projection_experts), true);
}

int64_t ModelSizes::routers() const {
  return layers(LayerKind::moe) + layers(LayerKind::inner_moe) * routers_of_inner_moe();
}

std::string ModelSizes::pattern_text() const {
  std::string text;
  for (const BlockPlan& plan : pattern)
    text += (text.empty() ? "" : " | ") + moemamba::pattern_text(plan);
  return text;
}

double ModelSizes::matmul_flops_per_token() const {
  const auto weights_of = [&](LayerKind kind) -> double {
    const int64_t scan = I * (R + 2 * N) + R * I;
    switch (kind) {
      case LayerKind::mamba:
        return double(3 * D * I + scan);
      case LayerKind::inner_moe: {
        // Each projection is between D and I; its experts are as wide.
        const int64_t expert = linear_projections ? D * I : (D + I) * projection_hidden;
        int64_t weights = scan;
        for (int p = 0; p < 3; ++p) {
          weights += projection_experts[p] ? K * expert : D * I;
          if (projection_experts[p] && !linear_projections)
            weights += E * (p == ModelConfig::OUTPUT ? I : D);
        }
        return double(weights + (linear_projections ? E * D : 0));
      }
      case LayerKind::attention:
        return double(D * (H + 2 * Hkv) * dh + H * dh * D);
      case LayerKind::feed_forward:
        return double(feed_forward.matrices() * D * feed_forward_hidden);
      case LayerKind::moe:
        return double(expert.matrices() * D * (K * F + shared_hidden) + D * E);
    }
    return 0;
  };
  double weights = double(V * D);
  for (int64_t i = 0; i < blocks; ++i)
    for (const SubLayerPlan& together : block(i))
      for (LayerKind kind : together) weights += weights_of(kind);
  return 6 * weights;
}

double ModelSizes::attention_flops_per_token(int64_t length) const {
  // Forward 4 dh per visible pair and head, backward 8 dh (the probabilities' recomputation aside).
  return double(layers(LayerKind::attention)) * 12.0 * double(H * dh) * double(length + 1) / 2;
}

}  // namespace moemamba
