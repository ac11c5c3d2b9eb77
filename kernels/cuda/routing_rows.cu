#include "kernels/cuda/routing.cuh"
#include "kernels/routing.h"

namespace moemamba {

namespace {

using namespace routing;

// The row movers: one warp per row or token, whose lanes take neighbouring packs (16 bytes, or one
// element where rows do not begin on 16-byte borders). All are bound by HBM: a row is read once per
// token that it goes to, and written once.

template <class Real, int kCount>
using Packs = Pack<Real, kCount>;

template <class Real, int kCount>
__device__ Packs<Real, kCount>* packs(Matrix<Real> m, int64_t r) {
  return reinterpret_cast<Packs<Real, kCount>*>(m.row(r));
}
template <class Real, int kCount>
__device__ const Packs<Real, kCount>* packs(Matrix<const Real> m, int64_t r) {
  return reinterpret_cast<const Packs<Real, kCount>*>(m.row(r));
}

// rows[r] = x[source[r] / K] for r < *filled: reads and writes R D elements.
template <class Real, int kCount>
__global__ __launch_bounds__(kThreads) void permute(Matrix<const Real> x, const int32_t* source,
                                                    const int32_t* filled, Matrix<Real> rows,
                                                    int64_t R, int64_t T, int32_t K, int64_t n) {
  const int64_t r = int64_t(blockIdx.x) * kWarps + warp();
  if (r >= R || r >= *filled) return;
  const int32_t choice = source[r];
  const int64_t t = choice / K;
  if (choice < 0 || t >= T) return;  // not what a Route wrote: never an address
  const auto* from = packs<Real, kCount>(x, t);
  auto* to = packs<Real, kCount>(rows, r);
#pragma unroll 4
  for (int64_t i = lane(); i < n; i += 32) to[i] = from[i];
}

// y[t] = sum over k in order of w rows[position[t, k]] (+ y[t]); w = 1 without `weight`. Reads
// T K rows, writes T; the sum is f32.
template <class Real, int kCount, bool kWeighted>
__global__ __launch_bounds__(kThreads) void gather(Matrix<const Real> rows,
                                                   Matrix<const int32_t> position,
                                                   Matrix<const float> weight, Matrix<Real> y,
                                                   int64_t R, int64_t T, int K, int64_t n,
                                                   bool accumulate) {
  const int64_t t = int64_t(blockIdx.x) * kWarps + warp();
  if (t >= T) return;
  const int32_t* at = position.row(t);
  const float* weights = kWeighted ? weight.row(t) : nullptr;
  auto* to = packs<Real, kCount>(y, t);
#pragma unroll 2
  for (int64_t i = lane(); i < n; i += 32) {
    float sum[kCount] = {};
    if (accumulate) {
      const Packs<Real, kCount> before = to[i];
#pragma unroll
      for (int j = 0; j < kCount; ++j) sum[j] = to_float(before.at[j]);
    }
    for (int k = 0; k < K; ++k) {
      const int32_t r = at[k];
      if (r < 0 || r >= R) continue;
      const Packs<Real, kCount> row = packs<Real, kCount>(rows, r)[i];
      const float w = kWeighted ? weights[k] : 1.f;
#pragma unroll
      for (int j = 0; j < kCount; ++j) sum[j] = fmaf(w, to_float(row.at[j]), sum[j]);
    }
    Packs<Real, kCount> out;
#pragma unroll
    for (int j = 0; j < kCount; ++j) out.at[j] = from_float<Real>(sum[j]);
    to[i] = out;
  }
}

// drows[position[t, k]] = w dy[t], dweight[t, k] = <dy[t], rows[position[t, k]]>. Reads T K rows
// and T of dy, writes T K rows. drows may be rows: a lane reads a pack before it writes there.
template <class Real, int kCount>
__global__ __launch_bounds__(kThreads) void scatter(Matrix<const Real> dy, Matrix<const Real> rows,
                                                    Matrix<const int32_t> position,
                                                    Matrix<const float> weight, Matrix<Real> drows,
                                                    Matrix<float> dweight, int64_t R, int64_t T,
                                                    int K, int64_t n) {
  const int64_t t = int64_t(blockIdx.x) * kWarps + warp();
  if (t >= T) return;
  const auto* from = packs<Real, kCount>(dy, t);
  for (int k = 0; k < K; ++k) {
    const int32_t r = position.row(t)[k];
    float dot = 0;
    if (r >= 0 && r < R) {  // the same on every lane
      const float w = weight.row(t)[k];
      const auto* forward = packs<Real, kCount>(rows, r);
      auto* to = packs<Real, kCount>(drows, r);
      for (int64_t i = lane(); i < n; i += 32) {
        const Packs<Real, kCount> d = from[i], x = forward[i];
        Packs<Real, kCount> out;
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          const float dj = to_float(d.at[j]);
          dot = fmaf(dj, to_float(x.at[j]), dot);
          out.at[j] = from_float<Real>(w * dj);
        }
        to[i] = out;
      }
    }
    dot = warp_sum(dot);
    if (lane() == 0) dweight.row(t)[k] = dot;
  }
}

// Calls fn.operator()<Real, kCount>(packs of a row) for rows of D elements of `dtype`.
template <class Fn>
void visit_packs(DType dtype, bool wide, int64_t D, Fn&& fn) {
  visit_real(dtype, [&]<class Real>() {
    constexpr int kWide = 16 / int(sizeof(Real));
    if (wide)
      fn.template operator()<Real, kWide>(D / kWide);
    else
      fn.template operator()<Real, 1>(D);
  });
}

unsigned blocks_for(int64_t rows) { return grid_of(ceil_divide(rows, kWarps)); }

// The two sums over a token's rows, one weighted.
template <bool kWeighted>
void gather_rows(Stream& stream, const char* name, const Tensor& rows, const Tensor& position,
                 const Tensor& weight, const Tensor& y, bool accumulate) {
  const int64_t T = y.rows(), D = y.cols();
  if (T == 0 || D == 0) return;
  visit_packs(y.dtype, aligned(rows) && aligned(y), D, [&]<class Real, int kCount>(int64_t n) {
    gather<Real, kCount, kWeighted><<<blocks_for(T), kThreads, 0, native(stream)>>>(
        matrix<const Real>(rows), matrix<const int32_t>(position), matrix<const float>(weight),
        matrix<Real>(y), rows.rows(), T, int(position.cols()), n, accumulate);
  });
  cuda_check(cudaGetLastError(), name);
}

}  // namespace

void run_cuda(Stream& stream, const Permute& op) {
  const int64_t R = op.rows.rows(), D = op.x.cols();
  if (R == 0 || D == 0) return;
  const bool wide = aligned(op.x) && aligned(op.rows);
  visit_packs(op.x.dtype, wide, D, [&]<class Real, int kCount>(int64_t n) {
    permute<Real, kCount><<<blocks_for(R), kThreads, 0, native(stream)>>>(
        matrix<const Real>(op.x), pointer<const int32_t>(op.source),
        pointer<const int32_t>(op.offsets) + op.offsets.cols() - 1, matrix<Real>(op.rows), R,
        op.x.rows(), int32_t(op.top_k), n);
  });
  cuda_check(cudaGetLastError(), op.name);
}

void run_cuda(Stream& stream, const PermuteBackward& op) {
  gather_rows<false>(stream, op.name, op.drows, op.position, Tensor(), op.dx, op.accumulate);
}

void run_cuda(Stream& stream, const Unpermute& op) {
  gather_rows<true>(stream, op.name, op.rows, op.position, op.weight, op.y, false);
}

void run_cuda(Stream& stream, const UnpermuteBackward& op) {
  const int64_t T = op.dy.rows(), D = op.dy.cols();
  if (T == 0) return;
  const bool wide = aligned(op.dy) && aligned(op.rows) && aligned(op.drows);
  visit_packs(op.dy.dtype, wide, D, [&]<class Real, int kCount>(int64_t n) {
    scatter<Real, kCount><<<blocks_for(T), kThreads, 0, native(stream)>>>(
        matrix<const Real>(op.dy), matrix<const Real>(op.rows),
        matrix<const int32_t>(op.position), matrix<const float>(op.weight),
        matrix<Real>(op.drows), matrix<float>(op.dweight), op.rows.rows(), T,
        int(op.position.cols()), n);
  });
  cuda_check(cudaGetLastError(), op.name);
}

}  // namespace moemamba
