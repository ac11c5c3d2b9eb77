#pragma once
#include "kernels/run.h"

namespace moemamba {  // letters: M, N, K of a product; E experts (groups), R rows sorted by group

// out = op(a) op(b) (+ out), op transposes where asked: op(a)[M, K], op(b)[K, N], out[M, N].
// Fixed tiles over M and N (and, for products summed over many rows, fixed blocks of K added in
// order), each one single-threaded BLAS call: the bits do not depend on the number of threads.
// On a GPU every tensor may be f32 or bf16. Sums are f32 always; with an f32 operand, or an f32 out
// of f32 operands, factors are f32 too (the router's products).
struct Matmul {
  static constexpr auto name = "matmul";
  Tensor a;    // [M, K], or [K, M] with a_transposed; read
  Tensor b;    // [K, N], or [N, K] with b_transposed; read
  Tensor out;  // [M, N] written (or added to)
  bool a_transposed = false;
  bool b_transposed = false;
  bool accumulate = false;
  static constexpr auto reads() { return std::tuple(&Matmul::a, &Matmul::b); }
  static constexpr auto writes() { return std::tuple(&Matmul::out); }
  void check() const;
};

// [1] i32, the last of a grouped product's offsets: how many rows are of groups.
Tensor grouped_rows(const Tensor& offsets);

// For every group e: out rows of e = (rows of e of a) op(b[e]). Rows past offsets[E] are not
// touched; empty groups cost nothing. Where that costs nothing, relu, or its gradient, is taken of
// the product before it is stored; it is what ActivationForward and -Backward make of out.
struct GroupedMatmul {
  static constexpr auto name = "grouped_matmul";
  Tensor a;        // [R, K] read, f32 or bf16
  Tensor b;        // [E, K, N], or [E, N, K] with b_transposed; read, dtype of a
  Tensor offsets;  // [E + 1] i32 read, ascending, offsets[0] = 0, offsets[E] <= R
  Tensor out;      // [R, N] written, dtype of a
  bool b_transposed = false;
  bool relu = false;     // out is 0 where the product is below 0
  Tensor positive = {};  // [R, N] read, optional, dtype of a: out is 0 where this is not above 0
  static constexpr auto reads() {
    return std::tuple(&GroupedMatmul::a, &GroupedMatmul::b, &GroupedMatmul::offsets,
                      &GroupedMatmul::positive);
  }
  static constexpr auto writes() { return std::tuple(&GroupedMatmul::out); }
  void check() const;
};

// For every group e: out[e] = (rows of e of a)' (rows of e of b) (+ out[e]). A group without rows
// writes zeros (or adds nothing).
struct GroupedOuter {
  static constexpr auto name = "grouped_outer";
  Tensor a;        // [R, M] read, f32 or bf16
  Tensor b;        // [R, N] read, dtype of a
  Tensor offsets;  // [E + 1] i32 read
  Tensor out;      // [E, M, N] written (or added to), f32
  bool accumulate = false;
  static constexpr auto reads() {
    return std::tuple(&GroupedOuter::a, &GroupedOuter::b, &GroupedOuter::offsets);
  }
  static constexpr auto writes() { return std::tuple(&GroupedOuter::out); }
  void check() const;
};

void run_cpu(Stream&, const Matmul&);
void run_cpu(Stream&, const GroupedMatmul&);
void run_cpu(Stream&, const GroupedOuter&);
void run_cuda(Stream&, const Matmul&);
void run_cuda(Stream&, const GroupedMatmul&);
void run_cuda(Stream&, const GroupedOuter&);

}  // namespace moemamba
