#include "model/mamba.h"

#include "model/first_values.h"

namespace moemamba {

Mamba Mamba::make(ParameterStore& store, const std::string& name, const ModelSizes& s, int index) {
  const FirstValues first(s);
  Mamba m;
  m.in = Linear::make(store, name + ".in_proj", {2 * s.I, s.D}, {first.linear(s.D), {}}, false);
  m.ssm = SelectiveSsm::make(store, name, s, index);
  m.out =
      Linear::make(store, name + ".out_proj", {s.D, s.I}, {first.linear_writes(s.I), {}}, false);
  return m;
}

Tensor Mamba::forward(Step& step, Tensor x, Saved& saved) const {
  const int64_t I = in.width() / 2;
  saved.x = x;
  const Tensor xz = in.forward(step, x, "mamba x and z");
  const Tensor y = ssm.forward(step, xz.column_range(0, I), xz.column_range(I, 2 * I), saved.ssm);
  return out.forward(step, y, "mamba output");
}

void Mamba::backward(Step& step, Tensor dy, Tensor dx, const Saved& saved) const {
  const int64_t I = in.width() / 2;
  Frame frame(step.arena);
  Tensor dgated = step.arena.take(saved.ssm.y.shape, dy.dtype, "mamba gradient of gated");
  Tensor dxz = step.arena.take({dy.rows(), 2 * I}, dy.dtype, "mamba gradient of x and z");
  out.backward(step, {.x = saved.ssm.y, .dy = dy, .dx = dgated});
  ssm.backward(step, {.dy = dgated, .dx = dxz.column_range(0, I), .dz = dxz.column_range(I, 2 * I)},
               saved.ssm);
  in.backward(step, {.x = saved.x, .dy = dxz, .dx = dx});
}

}  // namespace moemamba
