#include "model/moe.h"

#include <cmath>

#include "kernels/matmul.h"
#include "kernels/routing.h"

namespace moemamba {

namespace {

// Reads what the router decided; the host's copy of the facts is f64 and added in layer order.
void collect(RoutingFacts& facts, int layer, const Tensor& counts, const Tensor& balance,
             const Tensor& z, const Tensor& flag, const Tensor& offsets) {
  const int64_t G = counts.rows(), E = counts.cols();
  double chosen = 0;
  for (int64_t g = 0; g < G; ++g)
    for (int64_t e = 0; e < E; ++e) {
      const double count = counts.row<int32_t>(g)[e];
      facts.counts[size_t(layer * E + e)] += count;
      chosen += count;
    }
  for (int64_t g = 0; g < G; ++g) {
    facts.balance += balance.as<float>()[g];
    facts.z += z.as<float>()[g];
  }
  facts.dropped += chosen - offsets.as<int32_t>()[E];
  facts.not_a_number += flag.as<int32_t>()[0];
}

}  // namespace

MoE MoE::make(ParameterStore& store, const std::string& name, const ModelSizes& s,
              int64_t local_experts, int index) {
  using Kind = Initial::Kind;
  // Switch Transformer's truncated normal with scale 0.1, cut at +-2 scale; the paper's code takes
  // E F as the fan-in of the second matrix (docs/operators.md, "initial values").
  const auto normal = [&](int64_t fan_in) {
    return Initial{Kind::truncated_normal, std::sqrt(s.init_scale / double(fan_in)),
                   2.0 * s.init_scale};
  };
  MoE moe{.index = index,
          .K = s.K,
          .capacity_factor = s.capacity_factor,
          .renormalise = s.renormalise,
          .gated = s.gated()};
  switch (s.activation) {
    case ModelConfig::GELU:
      moe.activation = Activation::gelu;
      break;
    case ModelConfig::SILU:
      moe.activation = Activation::silu;
      break;
    default:
      moe.activation = Activation::relu;
  }
  moe.router = store.add(name + ".router.weight", {s.E, s.D}, normal(s.D));
  const Shape in{local_experts, s.F, s.D};
  moe.up = store.add(name + ".experts.{}.up.weight", in, normal(s.D), Axis::expert_data);
  if (moe.gated)
    moe.gate = store.add(name + ".experts.{}.gate.weight", in, normal(s.D), Axis::expert_data);
  moe.down = store.add(name + ".experts.{}.down.weight", {local_experts, s.D, s.F},
                       normal(s.E * s.F), Axis::expert_data);
  return moe;
}

void MoE::route(Step& step, Saved& saved) const {
  const int64_t T = saved.x.rows(), E = router->shape[0], G = step.routing_groups;
  Arena& arena = step.arena;
  saved.logits = arena.take({T, E}, DType::f32, "router logits");
  saved.probabilities = arena.take({T, E}, DType::f32, "router probabilities");
  saved.expert = arena.take({T, K}, DType::i32, "chosen experts");
  saved.weight = arena.take({T, K}, DType::f32, "expert weights");
  saved.position = arena.take({T, K}, DType::i32, "row positions");
  saved.source = arena.take({T * K}, DType::i32, "row sources");
  saved.offsets = arena.take({E + 1}, DType::i32, "expert offsets");
  saved.counts = arena.take({G, E}, DType::i32, "expert counts");
  Tensor balance = arena.take({G}, DType::f32, "balance loss");
  Tensor z = arena.take({G}, DType::f32, "z-loss");
  Tensor flag = arena.take({1}, DType::i32, "router flag");
  run(step.stream,
      Matmul{.a = saved.x, .b = router->value, .out = saved.logits, .b_transposed = true});
  run(step.stream, Route{.logits = saved.logits,
                         .probabilities = saved.probabilities,
                         .expert = saved.expert,
                         .weight = saved.weight,
                         .position = saved.position,
                         .source = saved.source,
                         .offsets = saved.offsets,
                         .counts = saved.counts,
                         .balance = balance,
                         .z = z,
                         .flag = flag,
                         .groups = G,
                         .capacity_factor = capacity_factor,
                         .renormalise = renormalise});
  if (step.facts && !step.stream.is_dry() && T > 0)
    collect(*step.facts, index, saved.counts, balance, z, flag, saved.offsets);
}

MoE::Chunk MoE::take_chunk(Step& step) const {
  const int64_t C = step.exchange->capacity(), D = router->shape[1];
  const int64_t local = up->shape[0], F = up->shape[1];
  Chunk chunk;
  chunk.x.values = step.arena.take({C, D}, DType::f32, "expert rows");
  chunk.x.offsets = step.arena.take({local + 1}, DType::i32, "offsets of expert rows");
  chunk.up = step.arena.take({C, F}, DType::f32, "expert hidden rows");
  if (gated) chunk.gate = step.arena.take({C, F}, DType::f32, "expert gate rows");
  chunk.hidden = step.arena.take({C, F}, DType::f32, "expert activations");
  return chunk;
}

void MoE::experts_forward(Step& step, const Chunk& chunk, Tensor out) const {
  const Tensor offsets = chunk.x.offsets;
  const Tensor rows = view(offsets.row<int32_t>(0) + offsets.cols() - 1, {1});
  run(step.stream, GroupedMatmul{.a = chunk.x.values,
                                 .b = up->value,
                                 .offsets = offsets,
                                 .out = chunk.up,
                                 .b_transposed = true});
  if (gated) {
    run(step.stream, GroupedMatmul{.a = chunk.x.values,
                                   .b = gate->value,
                                   .offsets = offsets,
                                   .out = chunk.gate,
                                   .b_transposed = true});
    run(step.stream,
        SwiGluForward{.gate = chunk.gate, .up = chunk.up, .rows = rows, .y = chunk.hidden});
  } else {
    run(step.stream,
        ActivationForward{.x = chunk.up, .rows = rows, .y = chunk.hidden, .kind = activation});
  }
  if (out)
    run(step.stream, GroupedMatmul{.a = chunk.hidden,
                                   .b = down->value,
                                   .offsets = offsets,
                                   .out = out,
                                   .b_transposed = true});
}

Tensor MoE::forward(Step& step, Tensor x, Saved& saved) const {
  const int64_t T = x.rows(), D = x.cols();
  ExpertExchange& exchange = *step.exchange;
  saved.x = x;
  route(step, saved);
  saved.first = take_chunk(step);
  saved.returned = step.arena.take({T * K, D}, x.dtype, "expert outputs");
  Tensor out = step.arena.take({T, D}, x.dtype, "moe output");
  exchange.plan(step.stream, saved.offsets);
  {
    Frame frame(step.arena);
    Tensor rows = step.arena.take({T * K, D}, x.dtype, "rows to send");
    Tensor staging = step.arena.take({exchange.capacity(), D}, x.dtype, "exchange staging");
    Tensor outputs = step.arena.take({exchange.capacity(), D}, x.dtype, "expert outputs");
    run(step.stream,
        Permute{
            .x = x, .source = saved.source, .offsets = saved.offsets, .rows = rows, .top_k = K});
    for (int64_t i = 0; i < exchange.chunks(); ++i) {
      Frame again(step.arena);
      const Chunk chunk = i == 0 ? saved.first : take_chunk(step);
      exchange.dispatch(step.stream, i, rows, chunk.x, staging);
      experts_forward(step, chunk, outputs);
      exchange.combine(step.stream, i, {outputs, chunk.x.offsets}, saved.returned, staging);
    }
  }
  run(step.stream,
      Unpermute{
          .rows = saved.returned, .position = saved.position, .weight = saved.weight, .y = out});
  return out;
}

void MoE::experts_backward(Step& step, const Chunk& chunk, Tensor dy, bool accumulate) const {
  const Tensor offsets = chunk.x.offsets, x = chunk.x.values;
  const Tensor rows = view(offsets.row<int32_t>(0) + offsets.cols() - 1, {1});
  Frame frame(step.arena);
  Tensor dhidden = step.arena.take(chunk.hidden.shape, DType::f32, "gradient of activations");
  run(step.stream, GroupedMatmul{.a = dy, .b = down->value, .offsets = offsets, .out = dhidden});
  step.weight_work(GroupedOuter{.a = dy,
                                .b = chunk.hidden,
                                .offsets = offsets,
                                .out = down->gradient,
                                .accumulate = accumulate});
  Tensor dgate;
  if (gated) {
    dgate = step.arena.take(chunk.hidden.shape, DType::f32, "gradient of the gate");
    run(step.stream, SwiGluBackward{.gate = chunk.gate,
                                    .up = chunk.up,
                                    .dy = dhidden,
                                    .rows = rows,
                                    .dgate = dgate,
                                    .dup = dhidden});
    step.weight_work(GroupedOuter{
        .a = dgate, .b = x, .offsets = offsets, .out = gate->gradient, .accumulate = accumulate});
  } else {
    run(step.stream,
        ActivationBackward{
            .x = chunk.up, .dy = dhidden, .rows = rows, .dx = dhidden, .kind = activation});
  }
  step.weight_work(GroupedOuter{
      .a = dhidden, .b = x, .offsets = offsets, .out = up->gradient, .accumulate = accumulate});
  run(step.stream, GroupedMatmul{.a = dhidden, .b = up->value, .offsets = offsets, .out = dy});
  if (gated) {
    Tensor more = step.arena.take(dy.shape, DType::f32, "gradient through the gate");
    run(step.stream, GroupedMatmul{.a = dgate, .b = gate->value, .offsets = offsets, .out = more});
    run(step.stream, Add{.a = dy, .b = more, .out = dy});
  }
}

void MoE::route_backward(Step& step, Tensor dweight, Tensor dx, const Saved& saved) const {
  Tensor dlogits = step.arena.take(saved.logits.shape, DType::f32, "gradient of router logits");
  run(step.stream, RouteBackward{.logits = saved.logits,
                                 .probabilities = saved.probabilities,
                                 .expert = saved.expert,
                                 .position = saved.position,
                                 .counts = saved.counts,
                                 .dweight = dweight,
                                 .dlogits = dlogits,
                                 .groups = step.routing_groups,
                                 .renormalise = renormalise,
                                 .balance_scale = step.balance_scale,
                                 .z_scale = step.z_scale});
  step.weight_work(Matmul{.a = dlogits,
                          .b = saved.x,
                          .out = router->gradient,
                          .a_transposed = true,
                          .accumulate = step.accumulate});
  run(step.stream, Matmul{.a = dlogits, .b = router->value, .out = dx, .accumulate = true});
}

void MoE::backward(Step& step, Tensor dy, Tensor dx, const Saved& saved) const {
  const int64_t T = dy.rows(), D = dy.cols();
  ExpertExchange& exchange = *step.exchange;
  Frame frame(step.arena);
  Tensor dweight = step.arena.take({T, K}, DType::f32, "gradient of expert weights");
  Tensor drows = saved.returned;  // its last use: the gradient takes its place
  run(step.stream, UnpermuteBackward{.dy = dy,
                                     .rows = saved.returned,
                                     .position = saved.position,
                                     .weight = saved.weight,
                                     .drows = drows,
                                     .dweight = dweight});
  exchange.plan(step.stream, saved.offsets);
  const int64_t C = exchange.capacity();
  Tensor rows = step.arena.take({T * K, D}, dy.dtype, "gradient rows that come back");
  Tensor sent;
  if (exchange.chunks() > 1) {
    sent = step.arena.take({T * K, D}, dy.dtype, "rows to send again");
    run(step.stream, Permute{.x = saved.x,
                             .source = saved.source,
                             .offsets = saved.offsets,
                             .rows = sent,
                             .top_k = K});
  }
  Tensor staging = step.arena.take({C, D}, dy.dtype, "exchange staging");
  Tensor dout = step.arena.take({C, D}, dy.dtype, "gradient of expert outputs");
  for (int64_t i = 0; i < exchange.chunks(); ++i) {
    Frame again(step.arena);
    const Chunk chunk = i == 0 ? saved.first : take_chunk(step);
    if (i > 0) {
      exchange.dispatch(step.stream, i, sent, chunk.x, staging);
      experts_forward(step, chunk, {});
    }
    exchange.dispatch(step.stream, i, drows, {dout, chunk.x.offsets}, staging);
    experts_backward(step, chunk, dout, step.accumulate || i > 0);
    exchange.combine(step.stream, i, {dout, chunk.x.offsets}, rows, staging);
  }
  run(step.stream, PermuteBackward{.drows = rows, .position = saved.position, .dx = dx});
  route_backward(step, dweight, dx, saved);
}

}  // namespace moemamba
