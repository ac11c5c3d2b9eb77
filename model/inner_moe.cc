#include "model/inner_moe.h"

#include "model/first_values.h"

namespace moemamba {

InnerMoE InnerMoE::make(ParameterStore& store, const std::string& name, const ModelSizes& s,
                        int64_t local_experts, int index, int& next_router) {
  const FirstValues first(s);
  InnerMoE layer;
  if (s.linear_projections)
    layer.router = Router::make(store, name + ".router", s, s.D, next_router++);
  const auto projection = [&](ModelConfig::Projection which, const char* called, int64_t in,
                              int64_t out) {
    const std::string full = name + "." + called;
    const bool writes = which == ModelConfig::OUTPUT;
    Projection p;
    if (!s.projection_experts[which]) {
      p.plain = Linear::make(store, full, {out, in},
                             {writes ? first.linear_writes(in) : first.linear(in), {}}, false);
      return p;
    }
    const Experts::Form form{.kind = {Activation::relu, false},
                             .in = in,
                             .hidden = s.projection_hidden,
                             .out = out,
                             .local = local_experts};
    if (s.linear_projections) {
      p.experts = Experts::make_linear(store, full, s, form, writes);
    } else {
      p.router = Router::make(store, full + ".router", s, in, next_router++);
      p.experts = Experts::make(store, full, s, form);
    }
    return p;
  };
  layer.conv = projection(ModelConfig::CONV, "conv_proj", s.D, s.I);
  layer.gate = projection(ModelConfig::GATE, "gate_proj", s.D, s.I);
  layer.ssm = SelectiveSsm::make(store, name, s, index);
  layer.out = projection(ModelConfig::OUTPUT, "out_proj", s.I, s.D);
  return layer;
}

Tensor InnerMoE::forward(Step& step, Tensor x, Saved& saved) const {
  if (router) router->forward(step, x, saved.routing);
  const Tensor inner = conv.forward(step, x, &saved.routing, saved.conv);
  const Tensor z = gate.forward(step, x, &saved.routing, saved.gate);
  const Tensor y = ssm.forward(step, inner, z, saved.ssm);
  return out.forward(step, y, &saved.routing, saved.out);
}

void InnerMoE::backward(Step& step, Tensor dy, Tensor dx, const Saved& saved) const {
  Frame frame(step.arena);
  const Shape inner = saved.ssm.y.shape;
  Tensor dgated = step.arena.take(inner, dy.dtype, "mamba gradient of gated");
  Tensor dinner = step.arena.take(inner, dy.dtype, "mamba gradient of x");
  Tensor dz = step.arena.take(inner, dy.dtype, "mamba gradient of z");
  Tensor dweight;
  if (router) {
    dweight = step.arena.take(saved.routing.weight.shape, DType::f32, "gradient of expert weights");
    if (out.plain) fill_zero(step.stream, dweight);  // nothing uses the weights
  }
  out.backward(step, {.dy = dy, .dx = dgated, .dweight = dweight}, &saved.routing, saved.out);
  ssm.backward(step, {.dy = dgated, .dx = dinner, .dz = dz}, saved.ssm);
  conv.backward(step, {.dy = dinner, .dx = dx}, &saved.routing, saved.conv);
  gate.backward(step, {.dy = dz, .dx = dx, .add = true}, &saved.routing, saved.gate);
  if (router) router->backward(step, dweight, dx, saved.routing);
}

}  // namespace moemamba
