#include "model/router.h"

#include "kernels/matmul.h"
#include "kernels/routing.h"
#include "model/first_values.h"

namespace moemamba {

namespace {

RouterKind kind_of(const Router& router) {
  return router.sigmoid ? RouterKind::sigmoid : RouterKind::softmax;
}

}  // namespace

Router Router::make(ParameterStore& store, const std::string& name, const ModelSizes& s,
                    int64_t width, int index) {
  Router router{.index = index,
                .K = s.K,
                .sigmoid = s.sigmoid_router,
                .capacity_factor = s.capacity_factor,
                .renormalise = s.renormalise,
                .scale = s.routed_scale};
  router.weight = store.add(name + ".weight", {s.E, width}, FirstValues(s).reads(width));
  if (s.router_bias_rate > 0) router.bias = store.add_state(name + ".bias", {s.E});
  return router;
}

void Router::forward(Step& step, Tensor x, Saved& saved) const {
  const int64_t T = x.rows(), E = experts(), G = step.routing_groups;
  Arena& arena = step.arena;
  saved.x = x;
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
      Matmul{.a = saved.x, .b = weight->value, .out = saved.logits, .b_transposed = true});
  run(step.stream, Route{.logits = saved.logits,
                         .bias = bias ? bias->value : Tensor{},
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
                         .capacity_factor = step.dropless ? 0 : capacity_factor,
                         .renormalise = renormalise,
                         .kind = kind_of(*this),
                         .scale = scale});
  if (step.facts && !step.stream.is_dry() && T > 0)
    run(step.stream, CollectRouting{.counts = saved.counts,
                                    .offsets = saved.offsets,
                                    .balance = balance,
                                    .z = z,
                                    .flag = flag,
                                    .choices = step.facts->choices.row_range(index, index + 1)
                                                   .reshaped({E}),
                                    .sums = step.facts->sums});
}

void Router::backward(Step& step, Tensor dweight, Tensor dx, const Saved& saved) const {
  Frame frame(step.arena);
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
                                 .kind = kind_of(*this),
                                 .scale = scale,
                                 .balance_scale = step.balance_scale,
                                 .z_scale = step.z_scale});
  step.weight_work(Matmul{.a = dlogits,
                          .b = saved.x,
                          .out = weight->gradient,
                          .a_transposed = true,
                          .accumulate = step.accumulate});
  run(step.stream, Matmul{.a = dlogits, .b = weight->value, .out = dx, .accumulate = true});
}

void Router::balance(Stream& stream, const double* counts, float rate) const {
  if (!bias) return;
  const int64_t E = experts();
  double sum = 0;
  for (int64_t e = 0; e < E; ++e) sum += counts[e];
  const bool far = bias->value.device == DeviceKind::cuda;
  std::vector<float> values(far ? size_t(E) : 0);  // the CPU's steps allocate nothing
  const Tensor host = far ? view(values.data(), {E}) : bias->value;
  if (far) copy(stream, bias->value, host);
  stream.synchronize();
  for (int64_t e = 0; e < E; ++e) {
    const double above = counts[e] * double(E) - sum;  // exact: counts are whole numbers
    host.as<float>()[e] += above < 0 ? rate : above > 0 ? -rate : 0.f;
  }
  if (far) copy(stream, host, bias->value);
  stream.synchronize();
}

}  // namespace moemamba
