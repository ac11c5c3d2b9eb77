#pragma once
#include "core/tensor.h"
#include "kernels/cpu/simd/operand.h"

namespace moemamba {

inline Source source(const Tensor& tensor) {
  return {static_cast<const float*>(tensor.data), tensor.stride};
}
inline Target target(const Tensor& tensor) {
  return {static_cast<float*>(tensor.data), tensor.stride};
}
inline float* floats(const Tensor& tensor) {
  return static_cast<float*>(tensor.data);
}

}  // namespace moemamba
