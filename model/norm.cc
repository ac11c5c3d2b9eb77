#include "model/norm.h"

namespace moemamba {

Norm Norm::make(ParameterStore& store, const std::string& name, const ModelSizes& sizes) {
  using Kind = Initial::Kind;
  Norm norm{.kind = sizes.norm, .eps = sizes.norm_eps};
  norm.weight = store.add(name + ".weight", {sizes.D}, {Kind::constant, 1});
  if (sizes.norm == NormKind::layer)
    norm.bias = store.add(name + ".bias", {sizes.D}, {Kind::constant, 0});
  return norm;
}

Tensor Norm::forward(Step& step, Tensor x, Tensor residual, Saved& saved) const {
  const int64_t T = x.rows(), D = x.cols();
  saved.s = residual ? residual : x;
  saved.mean = kind == NormKind::layer ? step.arena.take({T}, DType::f32, "norm mean") : Tensor{};
  saved.rstd = step.arena.take({T}, DType::f32, "norm rstd");
  Tensor y = step.arena.take({T, D}, x.dtype, "norm output");
  run(step.stream, NormForward{.x = x,
                               .residual = residual,
                               .weight = weight->value,
                               .bias = bias ? bias->value : Tensor{},
                               .sum = residual,
                               .y = y,
                               .mean = saved.mean,
                               .rstd = saved.rstd,
                               .kind = kind,
                               .eps = eps});
  return y;
}

void Norm::backward(Step& step, const Gradient& g, const Saved& saved) const {
  run(step.stream, NormBackward{.dy = g.dy,
                                .x = saved.s,
                                .weight = weight->value,
                                .mean = saved.mean,
                                .rstd = saved.rstd,
                                .dsum = g.dsum,
                                .dx = g.dx,
                                .dweight = weight->gradient,
                                .dbias = bias ? bias->gradient : Tensor{},
                                .kind = kind,
                                .accumulate = step.accumulate});
}

}  // namespace moemamba
