#include "model/moe.h"

namespace moemamba {

MoE MoE::make(ParameterStore& store, const std::string& name, const ModelSizes& s,
              int64_t local_experts, int router_index) {
  MoE moe;
  moe.router = Router::make(store, name + ".router", s, s.D, router_index);
  moe.experts = Experts::make(
      store, name, s,
      {.kind = s.expert, .in = s.D, .hidden = s.F, .out = s.D, .local = local_experts});
  if (s.shared_hidden > 0)
    moe.shared = FeedForward::make(store, name + ".shared", s,
                                   {.kind = s.expert, .hidden = s.shared_hidden, .bias = false});
  return moe;
}

Tensor MoE::forward(Step& step, Tensor x, Saved& saved) const {
  router.forward(step, x, saved.routing);
  Tensor y = experts.forward(step, x, saved.routing, saved.experts);
  if (shared) {
    const Tensor more = shared->forward(step, x, saved.shared);
    run(step.stream, Add{.a = y, .b = more, .out = y});
  }
  return y;
}

void MoE::backward(Step& step, Tensor dy, Tensor dx, const Saved& saved) const {
  Frame frame(step.arena);
  Tensor dweight =
      step.arena.take(saved.routing.weight.shape, DType::f32, "gradient of expert weights");
  experts.backward(step, {.dy = dy, .dx = dx, .dweight = dweight}, saved.routing, saved.experts);
  router.backward(step, dweight, dx, saved.routing);
  if (shared) {
    Tensor more = step.arena.take(dx.shape, dx.dtype, "gradient through the shared expert");
    shared->backward(step, dy, more, saved.shared);
    run(step.stream, Add{.a = dx, .b = more, .out = dx});
  }
}

}  // namespace moemamba
