#include "kernels/pointwise.h"

#include "kernels/cuda/packs.cuh"
#include "kernels/cuda/sums.cuh"

namespace moemamba {

namespace {

constexpr int kThreads = 256;

// 1 / (1 + exp(-x)) to about 2^-21; exp(-x) = inf gives 0.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }
// d silu(x) / dx, s = sigmoid(x)
__device__ __forceinline__ float silu_slope(float x, float s) { return s * fmaf(x, 1.f - s, 1.f); }
__device__ __forceinline__ float normal_cumulative(float x) {
  return 0.5f * erfcf(-0.70710678f * x);
}
__device__ __forceinline__ float normal_density(float x) {
  return 0.398942280f * __expf(-0.5f * (x * x));
}

// What is done with the in[] of one element to get its out[].
template <Activation kKind>
struct Forward {
  static constexpr int kIn = 1, kOut = 1;
  __device__ void operator()(const float* in, float* out) const {
    const float x = in[0];
    if constexpr (kKind == Activation::relu) out[0] = x < 0 ? 0.f : x;  // NaN stays NaN
    if constexpr (kKind == Activation::gelu) out[0] = x * normal_cumulative(x);
    if constexpr (kKind == Activation::silu) out[0] = x * sigmoid(x);
  }
};

template <Activation kKind>
struct Backward {
  static constexpr int kIn = 2, kOut = 1;
  __device__ void operator()(const float* in, float* out) const {
    const float x = in[0], dy = in[1];
    if constexpr (kKind == Activation::relu) out[0] = x > 0 ? dy : 0.f;
    if constexpr (kKind == Activation::gelu)
      out[0] = dy * fmaf(x, normal_density(x), normal_cumulative(x));
    if constexpr (kKind == Activation::silu) out[0] = dy * silu_slope(x, sigmoid(x));
  }
};

struct SwiGlu {
  static constexpr int kIn = 2, kOut = 1;
  __device__ void operator()(const float* in, float* out) const {
    out[0] = in[0] * sigmoid(in[0]) * in[1];
  }
};

struct SwiGluSlopes {
  static constexpr int kIn = 3, kOut = 2;
  __device__ void operator()(const float* in, float* out) const {
    const float gate = in[0], up = in[1], dy = in[2], s = sigmoid(gate);
    out[0] = dy * up * silu_slope(gate, s);
    out[1] = dy * (gate * s);
  }
};

struct Plus {
  static constexpr int kIn = 2, kOut = 1;
  __device__ void operator()(const float* in, float* out) const { out[0] = in[0] + in[1]; }
};

struct Same {
  static constexpr int kIn = 1, kOut = 1;
  __device__ void operator()(const float* in, float* out) const { out[0] = in[0]; }
};

template <class In, class Out, class Fn>
struct Operands {
  Lines<In> in[Fn::kIn];
  Lines<Out> out[Fn::kOut];
  int64_t T, F, packs;  // packs of a row
  const int32_t* rows;  // or null: how many of the T rows count
};

template <int kCount, class In, class Out, class Fn, class Part>
__device__ __forceinline__ void map_pack(const Operands<In, Out, Fn>& o, int64_t row,
                                         int64_t column, Part part) {
  float in[Fn::kIn][kCount], out[Fn::kOut][kCount];
#pragma unroll
  for (int j = 0; j < Fn::kIn; ++j) load<kCount>(o.in[j].row(row) + column, part, in[j]);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    float x[Fn::kIn], y[Fn::kOut];
#pragma unroll
    for (int j = 0; j < Fn::kIn; ++j) x[j] = in[j][i];
    Fn()(x, y);
#pragma unroll
    for (int j = 0; j < Fn::kOut; ++j) out[j][i] = y[j];
  }
#pragma unroll
  for (int j = 0; j < Fn::kOut; ++j) store<kCount>(o.out[j].row(row) + column, part, out[j]);
}

// One pack of every tensor per thread, 16 bytes or one element. Reads every input and writes every
// output once: bound by memory. An output may be an input.
template <int kCount, class In, class Out, class Fn>
__global__ void __launch_bounds__(kThreads) map_elements(Operands<In, Out, Fn> o) {
  const Place place = place_of(int64_t(blockIdx.x) * kThreads + threadIdx.x, o.packs);
  if (place.row >= (o.rows ? min(int64_t(*o.rows), o.T) : o.T)) return;
  const int64_t column = place.column * kCount;
  for_pack<kCount>(o.F - column,
                   [&](auto part) { map_pack<kCount>(o, place.row, column, part); });
}

template <class In, class Out, class Fn>
void launch(Stream& stream, const Tensor (&in)[Fn::kIn], const Tensor (&out)[Fn::kOut],
            const Tensor& rows, Fn) {
  constexpr int kPack = 16 / int(std::min(sizeof(In), sizeof(Out)));
  if (in[0].elements() == 0) return;
  Operands<In, Out, Fn> o{.T = in[0].rows(), .F = in[0].cols(), .rows = pointer<int32_t>(rows)};
  bool packed = true, dense = !rows;
  const auto look = [&](const Tensor& tensor) {
    packed = packed && rows_aligned(tensor);
    dense = dense && tensor.dense();
  };
  for (int j = 0; j < Fn::kIn; ++j) look(in[j]), o.in[j] = lines<In>(in[j]);
  for (int j = 0; j < Fn::kOut; ++j) look(out[j]), o.out[j] = lines<Out>(out[j]);
  if (dense) o.F *= o.T, o.T = 1;  // one long row
  o.packs = packed ? ceil_divide(o.F, kPack) : o.F;
  const unsigned grid = grid_of(ceil_divide(o.T * o.packs, kThreads));
  const auto kernel = packed ? map_elements<kPack, In, Out, Fn> : map_elements<1, In, Out, Fn>;
  kernel<<<grid, kThreads, 0, native(stream)>>>(o);
  cuda_check(cudaGetLastError(), "pointwise");
}

template <class Fn>
void map(Stream& stream, const Tensor (&in)[Fn::kIn], const Tensor (&out)[Fn::kOut],
         const Tensor& rows, Fn fn) {
  visit_real(in[0].dtype,
             [&]<class Real>() { launch<Real, Real, Fn>(stream, in, out, rows, fn); });
}

}  // namespace

void run_cuda(Stream& stream, const ActivationForward& op) {
  switch (op.kind) {
    case Activation::relu:
      return map(stream, {op.x}, {op.y}, op.rows, Forward<Activation::relu>());
    case Activation::gelu:
      return map(stream, {op.x}, {op.y}, op.rows, Forward<Activation::gelu>());
    case Activation::silu:
      return map(stream, {op.x}, {op.y}, op.rows, Forward<Activation::silu>());
  }
}

void run_cuda(Stream& stream, const ActivationBackward& op) {
  switch (op.kind) {
    case Activation::relu:
      return map(stream, {op.x, op.dy}, {op.dx}, op.rows, Backward<Activation::relu>());
    case Activation::gelu:
      return map(stream, {op.x, op.dy}, {op.dx}, op.rows, Backward<Activation::gelu>());
    case Activation::silu:
      return map(stream, {op.x, op.dy}, {op.dx}, op.rows, Backward<Activation::silu>());
  }
}

void run_cuda(Stream& stream, const SwiGluForward& op) {
  map(stream, {op.gate, op.up}, {op.y}, op.rows, SwiGlu());
}

void run_cuda(Stream& stream, const SwiGluBackward& op) {
  map(stream, {op.gate, op.up, op.dy}, {op.dgate, op.dup}, op.rows, SwiGluSlopes());
}

void run_cuda(Stream& stream, const Add& op) {
  map(stream, {op.a, op.b}, {op.out}, Tensor(), Plus());
}

void run_cuda(Stream& stream, const Cast& op) {
  visit_real(op.to.dtype, [&]<class Real>() {
    launch<float, Real, Same>(stream, {op.from}, {op.to}, Tensor(), Same());
  });
}

void run_cuda(Stream& stream, const Sum& op) {
  sum_terms(stream, op.x, op.sum, Term::value, op.accumulate);
}

}  // namespace moemamba
