#pragma once
// The vector kernels of the causal convolution, as plain addresses. Letters as in kernels/conv.h.
#include <cstdint>

#include "kernels/cpu/simd/level.h"
#include "kernels/cpu/simd/operand.h"

namespace moemamba {

inline constexpr int kConvLanes = 16;  // channels of a block: one vector
inline constexpr int kConvWidth = 8;   // W at most
inline constexpr int kConvPiece = 64;  // tokens that are convolved at a time

struct ConvInputs {
  int64_t L, D, W;
  int64_t blocks;  // of 16 channels; the last may be ragged
  Source x, weight;
  const float* bias;
  Source initial;         // [B, W - 1, D], may be absent
  const uint8_t* starts;  // [T] or null
};

struct ConvForwardCall {
  ConvInputs in;
  Target y;
  Target final;  // [B, W - 1, D], may be absent
};

struct ConvBackwardCall {
  ConvInputs in;
  Source dy;
  Source dfinal;  // [B, W - 1, D], may be absent
  Target dx;
  float* sums;      // [B, blocks, W + 1, 16]: of dweight, of dbias
  Target dinitial;  // [B, W - 1, D], may be absent
};

struct ConvKernels {
  // One sequence, one block of channels, all tokens.
  void (*forward)(const ConvForwardCall&, int64_t sequence, int64_t block);
  void (*backward)(const ConvBackwardCall&, int64_t sequence, int64_t block);
};
namespace avx2 {
extern const ConvKernels conv_kernels;
}
namespace avx512 {
extern const ConvKernels conv_kernels;
}
const ConvKernels& conv_kernels(SimdLevel level);

}  // namespace moemamba
