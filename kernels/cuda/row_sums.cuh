#pragma once
#include "kernels/cuda/common.cuh"

namespace moemamba {

constexpr int kSumLanes = 32, kSumRows = 8;

// Sums over the rows of parts[rows, cols]: thread y takes the rows y, y + kSumRows .. in order, and
// the kSumRows sums are added in order, so the bits do not depend on who runs when.
// finish(col, sum) takes what becomes of them. Reads each part once: bound by HBM.
template <class Finish>
__global__ void __launch_bounds__(kSumLanes* kSumRows)
    sum_rows(const float* parts, int64_t rows, int64_t cols, Finish finish) {
  __shared__ float sums[kSumRows][kSumLanes];
  const int64_t col = int64_t(blockIdx.x) * kSumLanes + threadIdx.x;
  float sum = 0;
  if (col < cols) {
#pragma unroll 4
    for (int64_t row = threadIdx.y; row < rows; row += kSumRows) sum += parts[row * cols + col];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || col >= cols) return;
#pragma unroll
  for (int y = 1; y < kSumRows; ++y) sum += sums[y][threadIdx.x];
  finish(col, sum);
}

template <class Finish>
void launch_sum_rows(Stream& stream, const float* parts, int64_t rows, int64_t cols,
                     const Finish& finish) {
  if (cols == 0) return;
  sum_rows<<<grid_of(ceil_divide(cols, kSumLanes)), dim3(kSumLanes, kSumRows), 0,
             native(stream)>>>(parts, rows, cols, finish);
}

}  // namespace moemamba
