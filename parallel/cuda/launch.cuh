#pragma once
#include <cuda_runtime.h>

#include "core/device.h"

namespace moemamba::device_work {

inline cudaStream_t native(const Stream& stream) {
  return static_cast<cudaStream_t>(stream.native());
}

inline void check_launch(const char* what) {
  const cudaError_t code = cudaGetLastError();
  check(code == cudaSuccess, what, ": CUDA: ", cudaGetErrorString(code), " (",
        cudaGetErrorName(code), ")");
}

// Blocks of a grid in x.
inline unsigned grid_of(int64_t blocks) {
  check(blocks > 0 && blocks < (int64_t{1} << 31), "a grid of ", blocks, " blocks");
  return unsigned(blocks);
}

inline bool on_16_bytes(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

}  // namespace moemamba::device_work
