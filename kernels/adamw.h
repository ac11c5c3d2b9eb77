#pragma once
#include "kernels/run.h"

namespace moemamba {  // letters: P elements of a flat slice

// AdamW (Loshchilov & Hutter), the arithmetic of torch.optim.AdamW:
//   g = verdict[0] * gradient;  value *= 1 - lr decay;  m = b1 m + (1 - b1) g;
//   v = b2 v + (1 - b2) g^2;  value -= lr (m / (1 - b1^step)) / (sqrt(v / (1 - b2^step)) + eps)
// Nothing at all is changed when verdict[1] is 0 (a gradient was not finite).
struct AdamW {
  static constexpr auto name = "adamw";
  Tensor gradient;  // [P] read, f32
  Tensor verdict;   // [2] read, f32: clip factor, finite
  Tensor value;     // [P] read and written, f32
  Tensor m;         // [P] read and written, f32
  Tensor v;         // [P] read and written, f32
  float lr = 1e-3f, beta1 = 0.9f, beta2 = 0.999f, eps = 1e-8f, decay = 0.1f;
  int64_t step = 1;  // counts from 1
  static constexpr auto reads() { return std::tuple(&AdamW::gradient, &AdamW::verdict); }
  static constexpr auto writes() { return std::tuple(&AdamW::value, &AdamW::m, &AdamW::v); }
  void check() const;
};

// sum[0] = sum of squares of x in f64 over fixed blocks in order (not finite where x is not).
struct SumOfSquares {
  static constexpr auto name = "sum_of_squares";
  Tensor x;    // [P] read, f32
  Tensor sum;  // [1] f64 written (or added to)
  bool accumulate = false;
  static constexpr auto reads() { return std::tuple(&SumOfSquares::x); }
  static constexpr auto writes() { return std::tuple(&SumOfSquares::sum); }
  void check() const;
};

void run_cpu(Stream&, const AdamW&);
void run_cpu(Stream&, const SumOfSquares&);
void run_cuda(Stream&, const AdamW&);
void run_cuda(Stream&, const SumOfSquares&);

}  // namespace moemamba
