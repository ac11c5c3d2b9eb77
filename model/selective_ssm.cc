#include "model/selective_ssm.h"

#include <cmath>

#include "kernels/conv.h"
#include "kernels/matmul.h"
#include "kernels/norm.h"
#include "kernels/scan.h"
#include "model/first_values.h"

namespace moemamba {

SelectiveSsm SelectiveSsm::make(ParameterStore& store, const std::string& name, const ModelSizes& s,
                                int index) {
  using Kind = Initial::Kind;
  // PyTorch's defaults, which mamba_ssm keeps: U(+-1/sqrt(fan_in)); dt_proj U(+-R^-0.5).
  const FirstValues first(s);
  SelectiveSsm m{.index = index, .norm_eps = s.norm_eps};
  m.conv = store.add(name + ".conv1d.weight", {s.I, s.W}, first.linear(s.W));
  m.conv_bias = store.add(name + ".conv1d.bias", {s.I}, first.linear(s.W));
  m.x_proj = store.add(name + ".x_proj.weight", {s.R + 2 * s.N, s.I}, first.linear(s.I));
  m.dt_proj = store.add(name + ".dt_proj.weight", {s.I, s.R}, first.linear(s.R));
  m.dt_bias = store.add(name + ".dt_proj.bias", {s.I}, {Kind::inverse_softplus_dt});
  m.a_log = store.add(name + ".A_log", {s.I, s.N}, {Kind::log_arange});
  m.skip = store.add(name + ".D", {s.I}, {Kind::constant, 1});
  if (s.mamba_norms) {
    m.norms[0] = store.add(name + ".dt_norm.weight", {s.R}, {Kind::constant, 1});
    m.norms[1] = store.add(name + ".b_norm.weight", {s.N}, {Kind::constant, 1});
    m.norms[2] = store.add(name + ".c_norm.weight", {s.N}, {Kind::constant, 1});
  }
  return m;
}

Tensor SelectiveSsm::part(Tensor proj, int which) const {
  const int64_t N = a_log->shape[1], R = dt_proj->shape[1];
  if (which == 0) return proj.column_range(0, R);
  return proj.column_range(R + (which - 1) * N, R + which * N);
}

void SelectiveSsm::norm_forward(Step& step, const Saved& saved) const {
  for (int i = 0; i < 3 && norms[0]; ++i)
    run(step.stream, NormForward{.x = part(saved.proj, i),
                                 .residual = {},
                                 .weight = norms[i]->value,
                                 .bias = {},
                                 .sum = {},
                                 .y = part(saved.normed, i),
                                 .mean = {},
                                 .rstd = saved.rstd[i],
                                 .kind = NormKind::rms,
                                 .eps = norm_eps});
}

// dproj: of the norms in, of what they read out.
void SelectiveSsm::norm_backward(Step& step, Tensor dproj, const Saved& saved) const {
  for (int i = 0; i < 3 && norms[0]; ++i)
    run(step.stream, NormBackward{.dy = part(dproj, i),
                                  .x = part(saved.proj, i),
                                  .weight = norms[i]->value,
                                  .mean = {},
                                  .rstd = saved.rstd[i],
                                  .dsum = {},
                                  .dx = part(dproj, i),
                                  .dweight = norms[i]->gradient,
                                  .dbias = {},
                                  .kind = NormKind::rms,
                                  .accumulate = step.accumulate});
}

// A narrow product, made again in backward: cheaper than to keep [T, I].
Tensor SelectiveSsm::dt(Step& step, const Saved& saved) const {
  Tensor dt = step.arena.take(saved.x.shape, saved.x.dtype, "mamba dt");
  run(step.stream, Matmul{.a = part(saved.normed, 0),
                          .b = dt_proj->compute,
                          .out = dt,
                          .b_transposed = true});
  return dt;
}

void SelectiveSsm::scan_forward(Step& step, Tensor c, Tensor dt, const Saved& saved) const {
  run(step.stream,
      ScanForward{.u = c,
                  .dt = dt,
                  .dt_bias = dt_bias->value,
                  .a_log = a_log->value,
                  .b = part(saved.normed, 1),
                  .c = part(saved.normed, 2),
                  .skip = skip->value,
                  .z = saved.z,
                  .initial = step.initial ? (*step.initial)[size_t(index)].scan : Tensor{},
                  .starts = step.starts,
                  .y = saved.y,
                  .states = saved.states,
                  .final = step.final ? (*step.final)[size_t(index)].scan : Tensor{},
                  .sequences = step.sequences});
}

// Cheaper to make again in backward than to keep: it is bound by memory, and read once there.
// final: the state after it, or none.
Tensor SelectiveSsm::convolved(Step& step, const Saved& saved, Tensor final) const {
  Tensor c = step.arena.take(saved.x.shape, saved.x.dtype, "mamba conv output");
  run(step.stream,
      ConvForward{.x = saved.x,
                  .weight = conv->value,
                  .bias = conv_bias->value,
                  .initial = step.initial ? (*step.initial)[size_t(index)].conv : Tensor{},
                  .starts = step.starts,
                  .y = c,
                  .final = final,
                  .sequences = step.sequences});
  return c;
}

Tensor SelectiveSsm::forward(Step& step, Tensor x, Tensor z, Saved& saved) const {
  const int64_t T = x.rows(), I = skip->shape[0], N = a_log->shape[1], R = dt_proj->shape[1];
  const int64_t B = step.sequences;
  saved.x = x;
  saved.z = z;
  saved.proj = step.arena.take({T, R + 2 * N}, x.dtype, "mamba dt, B, C");
  if (norms[0]) {
    saved.normed = step.arena.take(saved.proj.shape, saved.proj.dtype, "mamba norms of dt, B, C");
    for (Tensor& rstd : saved.rstd) rstd = step.arena.take({T}, DType::f32, "mamba norm rstd");
  } else {
    saved.normed = saved.proj;
  }
  const int64_t states = scan_state_elements(B, B ? T / B : 0, I, N, step.stream.device());
  saved.states = step.arena.take({states}, DType::f32, "scan states");
  saved.y = step.arena.take({T, I}, x.dtype, "scan output");
  Frame frame(step.arena);
  const Tensor c =
      convolved(step, saved, step.final ? (*step.final)[size_t(index)].conv : Tensor{});
  run(step.stream, Matmul{.a = c, .b = x_proj->compute, .out = saved.proj, .b_transposed = true});
  norm_forward(step, saved);
  scan_forward(step, c, dt(step, saved), saved);
  return saved.y;
}

void SelectiveSsm::scan_backward(Step& step, const ScanGradient& g, const Saved& saved) const {
  run(step.stream, ScanBackward{.u = g.c,
                                .dt = g.dt,
                                .dt_bias = dt_bias->value,
                                .a_log = a_log->value,
                                .b = part(saved.normed, 1),
                                .c = part(saved.normed, 2),
                                .skip = skip->value,
                                .z = saved.z,
                                .initial = {},
                                .starts = step.starts,
                                .states = saved.states,
                                .dy = g.dy,
                                .dfinal = {},
                                .du = g.dc,
                                .ddt = g.ddt,
                                .db = part(g.dproj, 1),
                                .dc = part(g.dproj, 2),
                                .dz = g.dz,
                                .da_log = a_log->gradient,
                                .ddt_bias = dt_bias->gradient,
                                .dskip = skip->gradient,
                                .dinitial = {},
                                .sequences = step.sequences,
                                .accumulate = step.accumulate});
}

void SelectiveSsm::backward(Step& step, const Gradient& g, const Saved& saved) const {
  const bool add = step.accumulate;
  Frame frame(step.arena);
  const Tensor c = convolved(step, saved, {});
  Tensor dc = step.arena.take(c.shape, g.dy.dtype, "mamba gradient of conv output");
  Tensor ddt = step.arena.take(c.shape, g.dy.dtype, "mamba gradient of dt");
  Tensor dproj = step.arena.take(saved.proj.shape, g.dy.dtype, "mamba gradient of dt, B, C");
  scan_backward(step,
                {.c = c,
                 .dt = dt(step, saved),
                 .dy = g.dy,
                 .dc = dc,
                 .ddt = ddt,
                 .dproj = dproj,
                 .dz = g.dz},
                saved);
  step.weight_work(Matmul{.a = ddt,
                          .b = part(saved.normed, 0),
                          .out = dt_proj->gradient,
                          .a_transposed = true,
                          .accumulate = add});
  run(step.stream, Matmul{.a = ddt, .b = dt_proj->compute, .out = part(dproj, 0)});
  norm_backward(step, dproj, saved);
  step.weight_work(Matmul{
      .a = dproj, .b = c, .out = x_proj->gradient, .a_transposed = true, .accumulate = add});
  run(step.stream, Matmul{.a = dproj, .b = x_proj->compute, .out = dc, .accumulate = true});
  run(step.stream, ConvBackward{.x = saved.x,
                                .weight = conv->value,
                                .bias = conv_bias->value,
                                .initial = {},
                                .starts = step.starts,
                                .dy = dc,
                                .dfinal = {},
                                .dx = g.dx,
                                .dweight = conv->gradient,
                                .dbias = conv_bias->gradient,
                                .dinitial = {},
                                .sequences = step.sequences,
                                .accumulate = add});
}

}  // namespace moemamba
