#pragma once
#include "kernels/cuda/common.cuh"

namespace moemamba {

// newest[t] = the place of the newest document start at or before token t, counted from the
// sequence's first token and `offset`; where there is none, first[sequence], or `none` without
// `first`. Then first[sequence] = newest of the sequence's last token.
struct Starts {
  Tensor starts;             // [T] u8 or not there: no starts
  int32_t* first = nullptr;  // [B] or null
  int32_t none = 0;
  int64_t offset = 0, B = 1, L = 1;
};
void find_starts(Stream& stream, const Starts& starts, int32_t* newest);  // newest: [T = B L]

}  // namespace moemamba
