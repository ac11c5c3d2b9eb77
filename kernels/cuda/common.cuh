#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "core/device.h"

namespace moemamba {

inline void cuda_check(cudaError_t code, const char* what) {
  check(code == cudaSuccess, what, ": CUDA: ", cudaGetErrorString(code), " (",
        cudaGetErrorName(code), ")");
}

inline cudaStream_t native(const Stream& stream) {
  return static_cast<cudaStream_t>(stream.native());
}

// What kernels compute on for a tensor's dtype: float or __nv_bfloat16.
// visit_real(dtype, [&]<class Real>() { kernel<Real><<<...>>>(pointer<Real>(op.x)); });
template <class Fn>
decltype(auto) visit_real(DType dtype, Fn&& fn) {
  check(dtype == DType::f32 || dtype == DType::bf16, "expected f32 or bf16, found ",
        name_of(dtype));
  return dtype == DType::bf16 ? fn.template operator()<__nv_bfloat16>()
                              : fn.template operator()<float>();
}

// Null for a tensor that is not there. REQUIRES: Real is of the tensor's dtype.
template <class Real>
Real* pointer(const Tensor& tensor) {
  return static_cast<Real*>(tensor.data);
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class Real>
__device__ __forceinline__ Real from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// `kCount` neighbours that are loaded and stored at once. 16 bytes: 4 floats or 8 bf16.
template <class Real, int kCount = 16 / int(sizeof(Real))>
struct alignas(sizeof(Real) * kCount) Pack {
  static constexpr int count = kCount;
  Real at[kCount];
};

// True where rows of `tensor` may be read in packs of `bytes`.
inline bool aligned(const Tensor& tensor, size_t bytes = 16) {
  const auto stride = size_t(tensor.stride * size_of(tensor.dtype));
  const auto cols = size_t(tensor.cols() * size_of(tensor.dtype));
  return reinterpret_cast<uintptr_t>(tensor.data) % bytes == 0 && cols % bytes == 0 &&
         (tensor.rows() <= 1 || stride % bytes == 0);
}

// The sum over a warp, in a fixed order, on every lane.
template <class Number>
__device__ __forceinline__ Number warp_sum(Number x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

// The sum over a block of kThreads, in a fixed order, on every thread. Called by all of them; may
// be called again at once.
template <int kThreads, class Number>
__device__ Number block_sum(Number x) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024);
  __shared__ Number parts[kThreads / 32];
  x = warp_sum(x);
  __syncthreads();  // the last call's readers are done
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  Number total = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) total += parts[w];
  return total;
}

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int multiprocessors() {
  int device = 0, count = 0;
  cuda_check(cudaGetDevice(&device), "cudaGetDevice");
  cuda_check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
             "cudaDeviceGetAttribute");
  return count;
}

// Blocks of a grid in x, which may have 2^31 - 1 of them (y and z: 65,535).
inline unsigned grid_of(int64_t blocks) {
  check(blocks > 0 && blocks < (int64_t{1} << 31), "a grid of ", blocks, " blocks");
  return unsigned(blocks);
}

}  // namespace moemamba
