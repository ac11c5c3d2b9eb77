#pragma once
#include "kernels/run.h"

namespace moemamba {  // letters: B sequences, L length, T = B L tokens, D channels, W conv width

// Causal depthwise convolution with SiLU, token-major:
//   p_t = bias + sum_w weight[:, w] * x[t - (W - 1) + w],   y = silu(p)
// Tokens before a sequence's first come from `initial` (else zero). A token t with starts[t] != 0
// begins a document: it and its followers see nothing before t. x, y, initial, final and their
// gradients are activations: all f32 or all bf16.
struct ConvForward {
  static constexpr auto name = "conv_forward";
  Tensor x;        // [T, D] read; rows may be strided
  Tensor weight;   // [D, W] read, f32, W <= 8
  Tensor bias;     // [D] read, f32
  Tensor initial;  // [B, W - 1, D] read, optional: the inputs before the first token
  Tensor starts;   // [T] u8 read, optional
  Tensor y;        // [T, D] written
  Tensor final;    // [B, W - 1, D] written, optional: the last inputs (zero before a document)
  int64_t sequences = 1;  // B
  static constexpr auto reads() {
    return std::tuple(&ConvForward::x, &ConvForward::weight, &ConvForward::bias,
                      &ConvForward::initial, &ConvForward::starts);
  }
  static constexpr auto writes() { return std::tuple(&ConvForward::y, &ConvForward::final); }
  void check() const;
};

struct ConvBackward {
  static constexpr auto name = "conv_backward";
  Tensor x;         // [T, D] read, as in forward (p is computed again)
  Tensor weight;    // [D, W] read, f32
  Tensor bias;      // [D] read, f32
  Tensor initial;   // [B, W - 1, D] read, optional
  Tensor starts;    // [T] u8 read, optional
  Tensor dy;        // [T, D] read
  Tensor dfinal;    // [B, W - 1, D] read, optional
  Tensor dx;        // [T, D] written; rows may be strided
  Tensor dweight;   // [D, W] written (or added to), f32
  Tensor dbias;     // [D] written (or added to), f32
  Tensor dinitial;  // [B, W - 1, D] written, optional
  int64_t sequences = 1;
  bool accumulate = false;
  static constexpr auto reads() {
    return std::tuple(&ConvBackward::x, &ConvBackward::weight, &ConvBackward::bias,
                      &ConvBackward::initial, &ConvBackward::starts, &ConvBackward::dy,
                      &ConvBackward::dfinal);
  }
  static constexpr auto writes() {
    return std::tuple(&ConvBackward::dx, &ConvBackward::dweight, &ConvBackward::dbias,
                      &ConvBackward::dinitial);
  }
  void check() const;
};

void run_cpu(Stream&, const ConvForward&);
void run_cpu(Stream&, const ConvBackward&);
void run_cuda(Stream&, const ConvForward&);
void run_cuda(Stream&, const ConvBackward&);

}  // namespace moemamba
