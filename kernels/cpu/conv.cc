#include "kernels/cpu/conv.h"

#include <algorithm>

#include "kernels/cpu/operands.h"
#include "kernels/cpu/simd/conv.h"

namespace moemamba {

namespace {

struct Sizes {
  int64_t B, T, D, W;
};

// What forward and backward read; both have the same fields.
template <class Op>
Sizes check_inputs(const Op& op) {
  const auto [T, D] = dims<2>("x[T, D]", op.x);
  const auto [rows, W] = dims<2>("weight[D, W]", op.weight);
  const int64_t B = op.sequences;
  check(B >= 1 ? T % B == 0 : B == 0 && T == 0, "sequences must divide the T = ", T,
        " tokens, found ", B);
  check(W >= 1 && W <= kConvWidth, "weight[D, W]: W must be 1 .. ", kConvWidth, ", found ", W);
  expect_real("x[T, D]", op.x);
  expect("weight[D, W]", op.weight, {D, W});
  expect("bias[D]", op.bias, {D});
  if (op.starts) expect("starts[T]", op.starts, {T}, DType::u8);
  return {B, T, D, W};
}

template <class Op>
ConvInputs inputs_of(const Op& op) {
  const int64_t D = op.x.cols();
  return {.L = op.sequences ? op.x.rows() / op.sequences : 0,
          .D = D,
          .W = op.weight.cols(),
          .blocks = (D + kConvLanes - 1) / kConvLanes,
          .x = source(op.x),
          .weight = source(op.weight),
          .bias = floats(op.bias),
          .initial = source(op.initial),
          .starts = static_cast<const uint8_t*>(op.starts.data)};
}

// dweight and dbias of one block, from the sequences' sums, in the sequences' order.
void sum_sequences(const ConvBackward& op, const ConvBackwardCall& call, int64_t block) {
  const ConvInputs& in = call.in;
  const int64_t rows = in.W + 1, first = block * kConvLanes;
  const int64_t lanes = std::min<int64_t>(kConvLanes, in.D - first);
  for (int64_t w = 0; w < rows; ++w) {
    float sum[kConvLanes] = {};
    for (int64_t sequence = 0; sequence < op.sequences; ++sequence) {
      const float* part = call.sums + ((sequence * in.blocks + block) * rows + w) * kConvLanes;
      for (int lane = 0; lane < kConvLanes; ++lane) sum[lane] += part[lane];
    }
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t d = first + lane;
      float& to = w == in.W ? floats(op.dbias)[d] : op.dweight.row<float>(d)[w];
      to = op.accumulate ? to + sum[lane] : sum[lane];
    }
  }
}

}  // namespace

const ConvKernels& conv_kernels(SimdLevel level) {
  return level == SimdLevel::avx512 ? avx512::conv_kernels : avx2::conv_kernels;
}

void ConvForward::check() const {
  const Sizes s = check_inputs(*this);
  if (initial) expect("initial[B, W - 1, D]", initial, {s.B, s.W - 1, s.D}, x.dtype);
  expect("y[T, D]", y, {s.T, s.D}, x.dtype);
  if (final) expect("final[B, W - 1, D]", final, {s.B, s.W - 1, s.D}, x.dtype);
}

void ConvBackward::check() const {
  const Sizes s = check_inputs(*this);
  if (initial) expect("initial[B, W - 1, D]", initial, {s.B, s.W - 1, s.D}, x.dtype);
  expect("dy[T, D]", dy, {s.T, s.D}, x.dtype);
  if (dfinal) expect("dfinal[B, W - 1, D]", dfinal, {s.B, s.W - 1, s.D}, x.dtype);
  expect("dx[T, D]", dx, {s.T, s.D}, x.dtype);
  expect("dweight[D, W]", dweight, {s.D, s.W});
  expect("dbias[D]", dbias, {s.D});
  if (dinitial) expect("dinitial[B, W - 1, D]", dinitial, {s.B, s.W - 1, s.D}, x.dtype);
}

void run_cpu(Stream& stream, const ConvForward& op, SimdLevel level) {
  const ConvForwardCall call{.in = inputs_of(op), .y = target(op.y), .final = target(op.final)};
  const ConvKernels& kernels = conv_kernels(level);
  stream.parallel_for(op.sequences * call.in.blocks, [&](int64_t task) {
    kernels.forward(call, task / call.in.blocks, task % call.in.blocks);
  });
}

void run_cpu(Stream& stream, const ConvBackward& op, SimdLevel level) {
  ConvBackwardCall call{.in = inputs_of(op),
                        .dy = source(op.dy),
                        .dfinal = source(op.dfinal),
                        .dx = target(op.dx),
                        .sums = nullptr,
                        .dinitial = target(op.dinitial)};
  const int64_t blocks = call.in.blocks;
  const int64_t sums = op.sequences * blocks * (call.in.W + 1) * kConvLanes;
  call.sums = reinterpret_cast<float*>(stream.workspace(size_t(sums) * sizeof(float)));
  const ConvKernels& kernels = conv_kernels(level);
  stream.parallel_for(op.sequences * blocks,
                      [&](int64_t task) { kernels.backward(call, task / blocks, task % blocks); });
  stream.parallel_for(blocks, [&](int64_t block) { sum_sequences(op, call, block); });
}

void run_cpu(Stream& stream, const ConvForward& op) {
  run_cpu(stream, op, simd_level());
}
void run_cpu(Stream& stream, const ConvBackward& op) {
  run_cpu(stream, op, simd_level());
}

}  // namespace moemamba
