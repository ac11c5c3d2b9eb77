#pragma once
// Loops over 16 lanes at a time with a masked tail, for the files of this folder alone.
#include "kernels/cpu/simd/lanes.h"

namespace moemamba::MOEMAMBA_SIMD {

struct Whole {};  // all 16 lanes
struct Part {     // the first `count` lanes
  int count;
};
inline Lanes load(const float* p, Whole) {
  return load(p);
}
inline Lanes load(const float* p, Part part) {
  return load(p, part.count);
}
inline void store(float* p, Lanes a, Whole) {
  store(p, a);
}
inline void store(float* p, Lanes a, Part part) {
  store(p, a, part.count);
}

// Calls body(i, which) for i = 0, 16, 32 ...; `which` says which lanes of i .. i + 15 exist.
template <class Body>
inline void for_lanes(int64_t count, Body body) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) body(i, Whole{});
  if (i < count) body(i, Part{int(count - i)});
}

}  // namespace moemamba::MOEMAMBA_SIMD
