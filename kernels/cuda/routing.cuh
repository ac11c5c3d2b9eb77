#pragma once
#include <cstdint>

#include "core/device.h"
#include "kernels/cuda/common.cuh"

namespace moemamba::routing {

// What routing.cu and routing_backward.cu share: one warp works on one token or row.

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;

// A tensor's rows as a kernel sees them.
template <class T>
struct Matrix {
  T* data = nullptr;
  int64_t stride = 0;
  __device__ T* row(int64_t r) const { return data + r * stride; }
};
template <class T>
Matrix<T> matrix(const Tensor& tensor) {
  return {static_cast<T*>(tensor.data), tensor.stride};
}

__device__ inline int lane() { return int(threadIdx.x % 32); }
__device__ inline int warp() { return int(threadIdx.x / 32); }

}  // namespace moemamba::routing
