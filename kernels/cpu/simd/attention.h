#pragma once
#include <cstdint>

#include "kernels/cpu/simd/level.h"

namespace moemamba {

// The products q . k of one query with a tile's keys, of which begin .. end are visible.
struct ScoreRow {
  float* scores;
  int64_t keys, begin, end;
  float scale;
};

struct AttentionKernels {
  // Scores become exp(scale score - greatest), zero where not visible. greatest and sum are those
  // of all tiles so far; y[width], the sum over the earlier tiles, and sum are moved to the new
  // greatest. *greatest starts at -inf, *sum and y at 0.
  void (*soften)(const ScoreRow& row, float* greatest, float* sum, float* y, int64_t width);
  // y *= w
  void (*scale)(float* y, float w, int64_t width);
  float (*dot)(const float* x, const float* y, int64_t width);
  // Scores become p = exp(scale score - lse), and dp becomes scale p (dp - delta), the gradient of
  // the product q . k; both zero where not visible.
  void (*backward)(const ScoreRow& row, float* dp, float lse, float delta);
};
namespace avx2 {
extern const AttentionKernels attention_kernels;
}
namespace avx512 {
extern const AttentionKernels attention_kernels;
}
const AttentionKernels& attention_kernels(SimdLevel level);

}  // namespace moemamba
