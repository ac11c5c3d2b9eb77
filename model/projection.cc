#include "model/projection.h"

namespace moemamba {

Tensor Projection::forward(Step& step, Tensor x, const Router::Saved* shared, Saved& saved) const {
  saved.x = x;
  if (plain) return plain->forward(step, x, "projection");
  if (router) router->forward(step, x, saved.routing);
  return experts->forward(step, x, router ? saved.routing : *shared, saved.experts);
}

void Projection::backward(Step& step, const Gradient& g, const Router::Saved* shared,
                          const Saved& saved) const {
  if (plain) {
    plain->backward(step, {.x = saved.x, .dy = g.dy, .dx = g.dx, .add = g.add});
    return;
  }
  if (!router) {
    experts->backward(step, {.dy = g.dy, .dx = g.dx, .dweight = g.dweight, .add = g.add}, *shared,
                      saved.experts);
    return;
  }
  Frame frame(step.arena);
  Tensor dweight =
      step.arena.take(saved.routing.weight.shape, DType::f32, "gradient of expert weights");
  experts->backward(step, {.dy = g.dy, .dx = g.dx, .dweight = dweight, .add = g.add}, saved.routing,
                    saved.experts);
  router->backward(step, dweight, g.dx, saved.routing);
}

}  // namespace moemamba
