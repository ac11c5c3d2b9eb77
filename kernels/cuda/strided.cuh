#pragma once
#include "kernels/cuda/common.cuh"

namespace moemamba {

// A tensor's rows, for kernels; `at` is null where there is no tensor.
template <class Real>
struct Strided {
  Real* at = nullptr;
  int64_t stride = 0;
  explicit Strided(const Tensor& tensor) : at(pointer<Real>(tensor)), stride(tensor.stride) {}
  __device__ Real* row(int64_t r) const { return at + r * stride; }
};

}  // namespace moemamba
