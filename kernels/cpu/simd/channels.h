#pragma once
// Addresses, loads and stores of a block of up to 16 channels. Only for files of this folder (see
// lanes.h).
#include "kernels/cpu/simd/lanes.h"
#include "kernels/cpu/simd/operand.h"

namespace moemamba::MOEMAMBA_SIMD {

// Channels past `count` read as zero and are not written.
inline Lanes load_channels(const float* p, int count) {
  return count == 16 ? load(p) : load(p, count);
}
inline void store_channels(float* p, Lanes a, int count) {
  if (count == 16)
    store(p, a);
  else
    store(p, a, count);
}

inline const float* at(const Source& rows, int64_t row, int64_t column) {
  return rows.data + row * rows.stride + column;
}
inline float* at(const Target& rows, int64_t row, int64_t column) {
  return rows.data + row * rows.stride + column;
}

inline int channels_of_block(int64_t D, int64_t block) {
  const int64_t left = D - block * 16;
  return left < 16 ? int(left) : 16;
}

}  // namespace moemamba::MOEMAMBA_SIMD
