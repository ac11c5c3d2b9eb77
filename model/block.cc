#include "model/block.h"

#include "kernels/pointwise.h"

namespace moemamba {

namespace {

// Both Mamba kinds are called mamba: what is around the projections is the same.
std::string layer_name(LayerKind kind) {
  return kind == LayerKind::inner_moe ? "mamba" : name_of(kind);
}

AnyLayer make_layer(ParameterStore& store, const ModelSizes& s, LayerKind kind, int64_t experts,
                    LayerCounts& counts) {
  const std::string name = layer_name(kind);
  switch (kind) {
    case LayerKind::mamba:
      return Mamba::make(store, name, s, counts.mamba++);
    case LayerKind::inner_moe:
      return InnerMoE::make(store, name, s, experts, counts.mamba++, counts.routers);
    case LayerKind::attention:
      return Attention::make(store, name, s, counts.attention++);
    case LayerKind::feed_forward:
      return FeedForward::make(
          store, name, s,
          {.kind = s.feed_forward, .hidden = s.feed_forward_hidden, .bias = s.feed_forward_bias});
    case LayerKind::moe:
      break;
  }
  return MoE::make(store, name, s, experts, counts.routers++);
}

}  // namespace

SubLayer SubLayer::make(ParameterStore& store, const ModelSizes& s, const SubLayerPlan& plan,
                        const Place& place, LayerCounts& counts) {
  SubLayer sub;
  sub.post = s.post_norm;
  const std::string norm = plan.size() == 1 ? layer_name(plan[0]) + "_norm" : "norm";
  sub.norm = Norm::make(store, norm, s);
  const int64_t experts =
      s.E ? place.layout.experts_of(place.layout.expert_coordinate(place.rank)) : 0;
  for (LayerKind kind : plan) sub.layers.push_back(make_layer(store, s, kind, experts, counts));
  return sub;
}

SubLayer::Saved SubLayer::make_saved() const {
  Saved saved;
  for (const AnyLayer& layer : layers)
    std::visit([&]<class L>(const L&) { saved.layers.emplace_back(typename L::Saved{}); }, layer);
  return saved;
}

Tensor SubLayer::layers_forward(Step& step, Tensor x, Saved& saved) const {
  Tensor sum;
  for (size_t i = 0; i < layers.size(); ++i) {
    const Tensor y = std::visit(
        [&]<class L>(const L& layer) {
          return layer.forward(step, x, std::get<typename L::Saved>(saved.layers[i]));
        },
        layers[i]);
    if (sum)
      run(step.stream, Add{.a = sum, .b = y, .out = sum});
    else
      sum = y;
  }
  return sum;
}

void SubLayer::layers_backward(Step& step, Tensor dy, Tensor dx, const Saved& saved) const {
  for (size_t i = 0; i < layers.size(); ++i) {
    Frame frame(step.arena);
    const Tensor own =
        i == 0 ? dx : step.arena.take(dx.shape, dx.dtype, "gradient of a layer's input");
    std::visit(
        [&]<class L>(const L& layer) {
          layer.backward(step, dy, own, std::get<typename L::Saved>(saved.layers[i]));
        },
        layers[i]);
    if (i > 0) run(step.stream, Add{.a = dx, .b = own, .out = dx});
  }
}

SubLayer::Residual SubLayer::forward(Step& step, Residual in, Saved& saved) const {
  if (!post) {
    const Tensor y = norm.forward(step, in.stream, in.pending, saved.norm);
    return {.stream = saved.norm.s, .pending = layers_forward(step, y, saved)};
  }
  const Tensor out = layers_forward(step, in.stream, saved);
  return {.stream = norm.forward(step, in.stream, out, saved.norm), .pending = {}};
}

void SubLayer::backward(Step& step, Tensor dstream, const Saved& saved) const {
  Frame frame(step.arena);
  Tensor dx = step.arena.take(dstream.shape, dstream.dtype, "gradient of a layer's input");
  if (!post) {
    layers_backward(step, dstream, dx, saved);
    norm.backward(step, {.dy = dx, .dsum = dstream, .dx = dstream}, saved.norm);
    return;
  }
  norm.backward(step, {.dy = dstream, .dsum = {}, .dx = dstream}, saved.norm);
  layers_backward(step, dstream, dx, saved);
  run(step.stream, Add{.a = dstream, .b = dx, .out = dstream});
}

}  // namespace moemamba
