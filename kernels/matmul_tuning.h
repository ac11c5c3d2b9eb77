#pragma once
#include <compare>
#include <iosfwd>
#include <span>
#include <string>

#include "core/device.h"

namespace moemamba {

// A Matmul as the table of algorithms (kernels/cuda/matmul_table.inc) knows it.
struct ProductShape {
  int64_t M = 0, N = 0, K = 0;
  bool a_transposed = false, b_transposed = false;
  DType a = DType::bf16, b = DType::bf16, out = DType::bf16;
  bool accumulate = false;
  auto operator<=>(const ProductShape&) const = default;
};

// SHA-256 of the table of algorithms: runs of one digest, on one GPU model and one cuBLASLt, take
// the same ones. Empty in a build without CUDA.
std::string matmul_table_digest();

// Times every algorithm that is allowed for each shape (median of 20, operands dense and of random
// numbers) on `stream`, and writes the fastest ones as lines of the table, each with its time and
// that of the rule without a table. Waits for the GPU and allocates: not for training. An Error in
// a build without CUDA.
void tune_matmul(Stream& stream, std::span<const ProductShape> shapes, std::ostream& out);

}  // namespace moemamba
