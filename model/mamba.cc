#include "model/mamba.h"

#include <cmath>

#include "kernels/conv.h"
#include "kernels/matmul.h"
#include "kernels/scan.h"

namespace moemamba {

Mamba Mamba::make(ParameterStore& store, const std::string& name, const ModelSizes& s, int index) {
  using Kind = Initial::Kind;
  // PyTorch's defaults, which mamba_ssm keeps: U(+-1/sqrt(fan_in)); dt_proj U(+-R^-0.5).
  const auto uniform = [](int64_t fan_in) {
    return Initial{Kind::uniform, 1 / std::sqrt(double(fan_in))};
  };
  Mamba m{.index = index};
  m.in = store.add(name + ".in_proj.weight", {2 * s.I, s.D}, uniform(s.D));
  m.conv = store.add(name + ".conv1d.weight", {s.I, s.W}, uniform(s.W));
  m.conv_bias = store.add(name + ".conv1d.bias", {s.I}, uniform(s.W));
  m.x_proj = store.add(name + ".x_proj.weight", {s.R + 2 * s.N, s.I}, uniform(s.I));
  m.dt_proj = store.add(name + ".dt_proj.weight", {s.I, s.R}, uniform(s.R));
  m.dt_bias = store.add(name + ".dt_proj.bias", {s.I}, {Kind::inverse_softplus_dt});
  m.a_log = store.add(name + ".A_log", {s.I, s.N}, {Kind::log_arange});
  m.skip = store.add(name + ".D", {s.I}, {Kind::constant, 1});
  m.out = store.add(name + ".out_proj.weight", {s.D, s.I}, uniform(s.I));
  return m;
}

Tensor Mamba::forward(Step& step, Tensor x, Saved& saved) const {
  const int64_t T = x.rows(), I = skip->shape[0], N = a_log->shape[1], R = dt_proj->shape[1];
  const int64_t B = step.sequences;
  const MambaState* before = step.initial ? &(*step.initial)[size_t(index)] : nullptr;
  const MambaState* after = step.final ? &(*step.final)[size_t(index)] : nullptr;
  saved.x = x;
  saved.xz = step.arena.take({T, 2 * I}, x.dtype, "mamba x and z");
  saved.c = step.arena.take({T, I}, x.dtype, "mamba conv output");
  saved.proj = step.arena.take({T, R + 2 * N}, x.dtype, "mamba dt, B, C");
  saved.dt = step.arena.take({T, I}, x.dtype, "mamba dt");
  saved.states =
      step.arena.take({scan_state_elements(B, B ? T / B : 0, I, N)}, DType::f32, "scan states");
  saved.y = step.arena.take({T, I}, x.dtype, "scan output");
  Tensor out_rows = step.arena.take({T, out->shape[0]}, x.dtype, "mamba output");
  run(step.stream, Matmul{.a = x, .b = in->value, .out = saved.xz, .b_transposed = true});
  run(step.stream, ConvForward{.x = saved.xz.column_range(0, I),
                               .weight = conv->value,
                               .bias = conv_bias->value,
                               .initial = before ? before->conv : Tensor{},
                               .starts = step.starts,
                               .y = saved.c,
                               .final = after ? after->conv : Tensor{},
                               .sequences = B});
  run(step.stream,
      Matmul{.a = saved.c, .b = x_proj->value, .out = saved.proj, .b_transposed = true});
  run(step.stream, Matmul{.a = saved.proj.column_range(0, R),
                          .b = dt_proj->value,
                          .out = saved.dt,
                          .b_transposed = true});
  run(step.stream, ScanForward{.u = saved.c,
                               .dt = saved.dt,
                               .dt_bias = dt_bias->value,
                               .a_log = a_log->value,
                               .b = saved.proj.column_range(R, R + N),
                               .c = saved.proj.column_range(R + N, R + 2 * N),
                               .skip = skip->value,
                               .z = saved.xz.column_range(I, 2 * I),
                               .initial = before ? before->scan : Tensor{},
                               .starts = step.starts,
                               .y = saved.y,
                               .states = saved.states,
                               .final = after ? after->scan : Tensor{},
                               .sequences = B});
  run(step.stream, Matmul{.a = saved.y, .b = out->value, .out = out_rows, .b_transposed = true});
  return out_rows;
}

void Mamba::scan_backward(Step& step, Tensor dgated, Tensor dc, Tensor ddt, Tensor dproj, Tensor dz,
                          const Saved& saved) const {
  const int64_t I = skip->shape[0], N = a_log->shape[1], R = dt_proj->shape[1];
  run(step.stream, ScanBackward{.u = saved.c,
                                .dt = saved.dt,
                                .dt_bias = dt_bias->value,
                                .a_log = a_log->value,
                                .b = saved.proj.column_range(R, R + N),
                                .c = saved.proj.column_range(R + N, R + 2 * N),
                                .skip = skip->value,
                                .z = saved.xz.column_range(I, 2 * I),
                                .initial = {},
                                .starts = step.starts,
                                .states = saved.states,
                                .dy = dgated,
                                .dfinal = {},
                                .du = dc,
                                .ddt = ddt,
                                .db = dproj.column_range(R, R + N),
                                .dc = dproj.column_range(R + N, R + 2 * N),
                                .dz = dz,
                                .da_log = a_log->gradient,
                                .ddt_bias = dt_bias->gradient,
                                .dskip = skip->gradient,
                                .dinitial = {},
                                .sequences = step.sequences,
                                .accumulate = step.accumulate});
}

void Mamba::backward(Step& step, Tensor dy, Tensor dx, const Saved& saved) const {
  const int64_t T = saved.x.rows(), I = skip->shape[0], N = a_log->shape[1], R = dt_proj->shape[1];
  const bool add = step.accumulate;
  Stream& stream = step.stream;
  Frame frame(step.arena);
  Tensor dgated = step.arena.take({T, I}, dy.dtype, "mamba gradient of gated");
  Tensor dc = step.arena.take({T, I}, dy.dtype, "mamba gradient of conv output");
  Tensor ddt = step.arena.take({T, I}, dy.dtype, "mamba gradient of dt");
  Tensor dproj = step.arena.take({T, R + 2 * N}, dy.dtype, "mamba gradient of dt, B, C");
  Tensor dxz = step.arena.take({T, 2 * I}, dy.dtype, "mamba gradient of x and z");
  run(stream, Matmul{.a = dy, .b = out->value, .out = dgated});
  step.weight_work(
      Matmul{.a = dy, .b = saved.y, .out = out->gradient, .a_transposed = true, .accumulate = add});
  scan_backward(step, dgated, dc, ddt, dproj, dxz.column_range(I, 2 * I), saved);
  step.weight_work(Matmul{.a = ddt,
                          .b = saved.proj.column_range(0, R),
                          .out = dt_proj->gradient,
                          .a_transposed = true,
                          .accumulate = add});
  run(stream, Matmul{.a = ddt, .b = dt_proj->value, .out = dproj.column_range(0, R)});
  step.weight_work(Matmul{
      .a = dproj, .b = saved.c, .out = x_proj->gradient, .a_transposed = true, .accumulate = add});
  run(stream, Matmul{.a = dproj, .b = x_proj->value, .out = dc, .accumulate = true});
  run(stream, ConvBackward{.x = saved.xz.column_range(0, I),
                           .weight = conv->value,
                           .bias = conv_bias->value,
                           .initial = {},
                           .starts = step.starts,
                           .dy = dc,
                           .dfinal = {},
                           .dx = dxz.column_range(0, I),
                           .dweight = conv->gradient,
                           .dbias = conv_bias->gradient,
                           .dinitial = {},
                           .sequences = step.sequences,
                           .accumulate = add});
  step.weight_work(
      Matmul{.a = dxz, .b = saved.x, .out = in->gradient, .a_transposed = true, .accumulate = add});
  run(stream, Matmul{.a = dxz, .b = in->value, .out = dx});
}

}  // namespace moemamba
