#pragma once
#include "kernels/run.h"

namespace moemamba {  // letters: P elements

// Keys of neighbours are this far apart (docs/checkpoint_format.md, "state hash").
inline constexpr uint64_t kHashStride = 0x9e3779b97f4a7c15u;

// sum[0] += sum over i of mix(mix(bits of x[i] + 1) + key + i kHashStride), modulo 2^64; mix is the
// finalizer of splitmix64, by which every bit moves every other. Sums of whole numbers: the same in
// any order.
struct StateHash {
  static constexpr auto name = "state_hash";
  Tensor x;    // [P] read, f32
  Tensor sum;  // [1] i64 added to
  uint64_t key = 0;
  static constexpr auto reads() { return std::tuple(&StateHash::x); }
  static constexpr auto writes() { return std::tuple(&StateHash::sum); }
  void check() const;
};

void run_cpu(Stream&, const StateHash&);
void run_cuda(Stream&, const StateHash&);

}  // namespace moemamba
