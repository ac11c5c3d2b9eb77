#include "kernels/adamw.h"

#include <cmath>

#include "kernels/cuda/packs.cuh"
#include "kernels/cuda/sums.cuh"

namespace moemamba {

namespace {

constexpr int kThreads = 256;

struct Update {
  const float *gradient, *verdict;
  float *value, *m, *v;
  int64_t P;
  float keep, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, root_bias, eps;
};

// Every rounding is the CPU's, so that a run that goes on elsewhere goes on with the same numbers.
template <int kCount, class Part>
__device__ __forceinline__ void update_pack(const Update& u, float clip, int64_t at, Part part) {
  float gradient[kCount], value[kCount], m[kCount], v[kCount];
  load<kCount>(u.gradient + at, part, gradient);
  load<kCount>(u.value + at, part, value);
  load<kCount>(u.m + at, part, m);
  load<kCount>(u.v + at, part, v);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float g = __fmul_rn(clip, gradient[i]);
    m[i] = __fmaf_rn(u.beta1, m[i], __fmul_rn(u.one_minus_beta1, g));
    v[i] = __fmaf_rn(u.beta2, v[i], __fmul_rn(u.one_minus_beta2, __fmul_rn(g, g)));
    const float divisor = __fmaf_rn(__fsqrt_rn(v[i]), u.root_bias, u.eps);
    const float kept = __fmul_rn(value[i], u.keep);
    value[i] = __fsub_rn(kept, __fmul_rn(u.step_size, __fdiv_rn(m[i], divisor)));
  }
  store<kCount>(u.value + at, part, value);
  store<kCount>(u.m + at, part, m);
  store<kCount>(u.v + at, part, v);
}

// Four elements a thread (one where the slices do not begin on 16-byte borders). Reads 16 and
// writes 12 bytes an element: bound by memory.
template <int kCount>
__global__ void __launch_bounds__(kThreads) update(Update u) {
  const int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kCount;
  const float clip = u.verdict[0], finite = u.verdict[1];
  if (at >= u.P || finite == 0) return;
  for_pack<kCount>(u.P - at, [&](auto part) { update_pack<kCount>(u, clip, at, part); });
}

}  // namespace

void run_cuda(Stream& stream, const AdamW& op) {
  if (op.value.elements() == 0) return;
  const double step = double(op.step);
  const Update all{
      .gradient = pointer<float>(op.gradient),
      .verdict = pointer<float>(op.verdict),
      .value = pointer<float>(op.value),
      .m = pointer<float>(op.m),
      .v = pointer<float>(op.v),
      .P = op.value.elements(),
      .keep = float(1 - double(op.lr) * double(op.decay)),
      .beta1 = op.beta1,
      .one_minus_beta1 = float(1 - double(op.beta1)),
      .beta2 = op.beta2,
      .one_minus_beta2 = float(1 - double(op.beta2)),
      .step_size = float(double(op.lr) / (1 - std::pow(double(op.beta1), step))),
      .root_bias = float(1 / std::sqrt(1 - std::pow(double(op.beta2), step))),
      .eps = op.eps,
  };
  const bool packed = rows_aligned(op.gradient) && rows_aligned(op.value) && rows_aligned(op.m) &&
                      rows_aligned(op.v);
  const auto kernel = packed ? update<4> : update<1>;
  const unsigned grid = grid_of(ceil_divide(all.P, int64_t{kThreads} * (packed ? 4 : 1)));
  kernel<<<grid, kThreads, 0, native(stream)>>>(all);
  cuda_check(cudaGetLastError(), AdamW::name);
}

void run_cuda(Stream& stream, const SumOfSquares& op) {
  sum_terms(stream, op.x, op.sum, Term::square, op.accumulate);
}

}  // namespace moemamba
