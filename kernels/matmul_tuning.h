#pragma once
#include <compare>
#include <iosfwd>
#include <span>
#include <string>
#include <vector>

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

// One to tune as an operator has it: elements from row to row, 0 where rows lie end to end. The
// table knows shapes alone.
struct TuningCase {
  ProductShape shape;
  int64_t a_stride = 0, b_stride = 0, out_stride = 0;
};
// The products that operators on `stream` have given to cuBLASLt so far and that the table may
// decide, each shape once, in order. An Error in a build without CUDA.
std::vector<TuningCase> products_met(Stream& stream);

// SHA-256 of the table of algorithms: runs of one digest, on one GPU model and one cuBLASLt, take
// the same ones. Empty in a build without CUDA.
std::string matmul_table_digest();

// Times every algorithm that is allowed for each product (median of 20, operands of random numbers)
// on `stream`, and writes the fastest ones as lines of the table, each with its time and that of
// the rule without a table. Waits for the GPU and allocates: not for training. An Error in a build
// without CUDA.
void tune_matmul(Stream& stream, std::span<const TuningCase> products, std::ostream& out);

}  // namespace moemamba
