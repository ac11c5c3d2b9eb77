#include "model/linear.h"

#include "kernels/bias.h"
#include "kernels/matmul.h"

namespace moemamba {

Linear Linear::make(ParameterStore& store, const std::string& name, Shape shape,
                    const Initials& initials, bool with_bias) {
  Linear linear;
  linear.weight = store.add(name + ".weight", shape, initials.weight);
  if (with_bias) linear.bias = store.add(name + ".bias", {shape[0]}, initials.bias);
  return linear;
}

Tensor Linear::forward(Step& step, Tensor x, const char* who) const {
  Tensor y = step.arena.take({x.rows(), width()}, x.dtype, who);
  forward(step, x, y);
  return y;
}

void Linear::forward(Step& step, Tensor x, Tensor y) const {
  run(step.stream, Matmul{.a = x, .b = weight->compute, .out = y, .b_transposed = true});
  if (bias) run(step.stream, AddBias{.x = y, .bias = bias->value, .y = y});
}

void Linear::backward(Step& step, const Gradient& g) const {
  step.weight_work(Matmul{.a = g.dy,
                          .b = g.x,
                          .out = weight->gradient,
                          .a_transposed = true,
                          .accumulate = step.accumulate});
  if (bias)
    step.weight_work(
        BiasBackward{.dy = g.dy, .dbias = bias->gradient, .accumulate = step.accumulate});
  if (g.dx)
    run(step.stream, Matmul{.a = g.dy, .b = weight->compute, .out = g.dx, .accumulate = g.add});
}

}  // namespace moemamba
