#pragma once
#include <string>
#include <vector>

#include "core/device.h"
#include "model/config.h"

namespace moemamba {

// What an operator is measured against: bytes a second of a copy, each byte counted when it is read
// and when it is written, or FLOP a second of a large product of the model's dtype.
enum class Limit : uint8_t { copy, product };

struct KernelBench {
  struct Row {
    std::string name, shape;
    double seconds;  // median
    double amount;   // bytes that must be read or written once, or FLOPs
    Limit limit;
  };
  std::string copied, multiplied;  // what the ceilings were measured with
  double copy_rate = 0, product_rate = 0;
  std::vector<Row> rows;
  double rate_of(Limit limit) const { return limit == Limit::copy ? copy_rate : product_rate; }
};

// The operators of a step of `sequences` sequences of `length` tokens, at the shapes that they have
// in the model, all its experts on one rank. Each the median of `repeat` runs.
struct KernelBenchOptions {
  int64_t sequences, length, repeat = 20;
};
KernelBench bench_kernels(Stream& stream, const ModelSizes& sizes,
                          const KernelBenchOptions& options);

// The ceiling of products: FLOP a second of one of large square matrices, and what it multiplied.
struct ProductCeiling {
  double rate = 0;
  std::string multiplied;  // "8192 x 8192 x 8192, bf16"
};
ProductCeiling measure_product(Stream& stream, DType dtype, int64_t repeat);

// A table for people.
std::string kernel_bench_text(const KernelBench& bench);

}  // namespace moemamba
