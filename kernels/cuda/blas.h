#pragma once
#include <cublasLt.h>

#include <compare>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "core/arena.h"
#include "kernels/cuda/products.h"
#include "kernels/matmul_tuning.h"

namespace moemamba {

// All that cuBLASLt's choice of an algorithm may depend on.
struct Product {
  ProductShape shape;
  int64_t a_stride = 0, b_stride = 0, out_stride = 0;
  // Powers of two that divide the addresses, at most 16: no kernel asks for more.
  uint32_t a_alignment = 0, b_alignment = 0, out_alignment = 0;
  auto operator<=>(const Product&) const = default;
};
Product product_of(const Matmul& op);

// cuBLASLt, on one stream: its handle, its workspace, and the algorithm of every product seen so
// far. Lives as long as the stream, in its attachment. Nothing of ours is allocated for a product
// that was seen before.
//
// cuBLASLt counts columns first. A row-major [rows, cols] is its [cols, rows], so it is asked for
// out' = op(b)' op(a)': our b is its first operand, and no data is transposed.
class Blas {
 public:
  Blas();
  Blas(const Blas&) = delete;
  Blas& operator=(const Blas&) = delete;
  ~Blas();
  static Blas& of(Stream& stream);  // made at the first call

  bool takes(const Matmul& op);
  // Enqueues op. False, and nothing done: !takes(op).
  bool multiply(Stream& stream, const Matmul& op);

  // For the tuner: up to 64 algorithms for op that are allowed here, best guess first; and op by
  // one of them.
  std::vector<cublasLtMatmulAlgo_t> candidates(const Matmul& op);
  bool multiply_by(Stream& stream, const Matmul& op, const cublasLtMatmulAlgo_t& algorithm);

  // All that were taken so far and lie as the table's do, in order.
  std::vector<Product> products() const;

  const std::string& gpu_name() const { return gpu_name_; }

 private:
  struct Plan {
    cublasLtMatmulDescOpaque_t description{};
    cublasLtMatrixLayoutOpaque_t first{}, second{}, out{};  // b, a, out
    cublasLtMatmulAlgo_t algorithm{};
    bool found = false;
  };
  Plan& plan_of(const Matmul& op);
  Plan describe(const Product& product) const;
  int guess(Plan& plan, const Product& product, std::span<cublasLtMatmulHeuristicResult_t> to);
  bool take_from_table(Plan& plan, const Product& product);
  void enqueue(Stream& stream, const Matmul& op, Plan& plan, const cublasLtMatmulAlgo_t& algorithm);

  cublasLtHandle_t handle_ = nullptr;
  Buffer workspace_;
  std::string gpu_name_;
  std::map<Product, Plan> plans_;
};

}  // namespace moemamba
