#pragma once
#include <array>
#include <span>
#include <string_view>

#include "kernels/matmul_tuning.h"

namespace moemamba {

// One line of kernels/cuda/matmul_table.inc, as tune_matmul writes it: on this GPU, with this
// version of cuBLASLt, this shape is multiplied by this algorithm (cublasLtMatmulAlgo_t).
struct TunedProduct {
  uint64_t version;      // cublasLtGetVersion()
  std::string_view gpu;  // as the driver names it
  ProductShape shape;
  std::array<uint64_t, 8> algorithm;
};
std::span<const TunedProduct> matmul_table();

}  // namespace moemamba
