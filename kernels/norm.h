#pragma once
#include "kernels/run.h"

namespace moemamba {  // letters: T tokens, D model width
                      // [T, D] tensors: f32 or bf16, all of one operator alike

enum class NormKind : uint8_t { layer, rms };

// s = x (+ residual).
// layer: y = (s - mean) * rstd * weight + bias, rstd = 1 / sqrt(var(s) + eps) over each row
// rms:   y = s * rstd * weight,                 rstd = 1 / sqrt(mean(s^2) + eps)
struct NormForward {
  static constexpr auto name = "norm_forward";
  Tensor x;         // [T, D] read
  Tensor residual;  // [T, D] read, optional
  Tensor weight;    // [D] read, f32
  Tensor bias;      // [D] read, f32; layer only
  Tensor sum;       // [T, D] written, with residual: x + residual; may be x or residual;
                    //        normalised as it was written, so that backward sees the same
  Tensor y;         // [T, D] written
  Tensor mean;      // [T] written, f32; layer only; backward needs it
  Tensor rstd;      // [T] written, f32; backward needs it
  NormKind kind = NormKind::layer;
  float eps = 1e-5f;
  static constexpr auto reads() {
    return std::tuple(&NormForward::x, &NormForward::residual, &NormForward::weight,
                      &NormForward::bias);
  }
  static constexpr auto writes() {
    return std::tuple(&NormForward::sum, &NormForward::y, &NormForward::mean, &NormForward::rstd);
  }
  void check() const;
};

// dx = (gradient of s through the norm) (+ dsum). Weight gradients are summed over fixed blocks of
// rows in block order, so that they do not depend on the number of threads.
struct NormBackward {
  static constexpr auto name = "norm_backward";
  Tensor dy;       // [T, D] read
  Tensor x;        // [T, D] read: s of forward
  Tensor weight;   // [D] read, f32
  Tensor mean;     // [T] read, f32; layer only
  Tensor rstd;     // [T] read, f32
  Tensor dsum;     // [T, D] read, optional: the gradient that reaches s beside the norm
  Tensor dx;       // [T, D] written; may be dsum or dy
  Tensor dweight;  // [D] written (or added to), f32
  Tensor dbias;    // [D] written (or added to), f32; layer only
  NormKind kind = NormKind::layer;
  bool accumulate = false;  // add to dweight and dbias instead of overwriting them
  static constexpr auto reads() {
    return std::tuple(&NormBackward::dy, &NormBackward::x, &NormBackward::weight,
                      &NormBackward::mean, &NormBackward::rstd, &NormBackward::dsum);
  }
  static constexpr auto writes() {
    return std::tuple(&NormBackward::dx, &NormBackward::dweight, &NormBackward::dbias);
  }
  void check() const;
};

void run_cpu(Stream&, const NormForward&);
void run_cpu(Stream&, const NormBackward&);
void run_cuda(Stream&, const NormForward&);
void run_cuda(Stream&, const NormBackward&);

}  // namespace moemamba
