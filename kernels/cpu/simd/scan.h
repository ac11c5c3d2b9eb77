#pragma once
// The vector kernels of the selective scan, as plain addresses: what kernels/cpu/scan.cc hands to
// the code of one instruction set. Letters as in kernels/scan.h; G groups of channel blocks.
#include <cstdint>

#include "kernels/cpu/simd/level.h"
#include "kernels/cpu/simd/operand.h"

namespace moemamba {

inline constexpr int kScanLanes = 16;          // channels of a block: one vector
inline constexpr int kScanBlocks = 8;          // channel blocks of a group in backward at most
inline constexpr int kScanForwardBlocks = 32;  // likewise in forward
inline constexpr int kScanSteps = 32;          // steps of a chunk: kScanChunk
inline constexpr int kScanStates = 64;         // N at most
inline constexpr int kScanWidth = 4;           // states that a pass keeps in registers

struct ScanInputs {
  int64_t L, D, N;
  int64_t blocks;  // of 16 channels; the last may be ragged
  int64_t groups;  // group g has the blocks g * blocks / groups .. (g + 1) * blocks / groups
  Source u, dt, b, c, z;
  const float* dt_bias;
  const float* skip;
  const float* rates;     // [blocks, N + 1, 16], from scan_rates
  Source initial;         // [B, D, N], may be absent
  const uint8_t* starts;  // [T] or null
};

struct ScanForwardCall {
  ScanInputs in;
  Target y;
  float* states;  // [B, ceil(L / 32), blocks, N, 16] or null: the state before each chunk
  Target final;   // [B, D, N], may be absent
};

struct ScanBackwardCall {
  ScanInputs in;
  Source dy;
  const float* states;
  Source dfinal;  // [B, D, N], may be absent
  Target du, ddt, dz;
  Target db, dc;       // a group's partial sums over its channels; group g's begin at
  int64_t group_step;  // data + g * group_step
  float* sums;         // [B, blocks, N + 2, 16]: of delta dA per state, of dskip, of ddt_bias
  Target dinitial;     // [B, D, N], may be absent
};

// What one thread works in. Fields that are used together lie together: equal offsets in arrays of
// a power of two would share one set of the cache.
struct alignas(64) ScanForwardScratch {
  struct Step {
    float delta[kScanLanes], du[kScanLanes], p[kScanLanes];
  };
  Step steps[kScanSteps];
  float state[kScanForwardBlocks * kScanStates * kScanLanes];  // [block, n, lane]
};

struct alignas(64) ScanBackwardScratch {
  struct Step {  // of one block: sum_gb = sum_n g b, sum_rate = sum_n rate g a h
    float delta[kScanLanes], du[kScanLanes], dp[kScanLanes], p[kScanLanes];
    float sum_gb[kScanLanes], sum_rate[kScanLanes];
  };
  struct States {  // the decay of a step and the state after it
    float decay[kScanWidth][kScanLanes], h[kScanWidth][kScanLanes];
  };
  struct Sums {  // of db and dc over the group's blocks
    float b[kScanWidth][kScanLanes], c[kScanWidth][kScanLanes];
  };
  Step steps[kScanBlocks][kScanSteps];
  States states[kScanSteps + 1];  // [0].h: before the chunk
  Sums sums[kScanSteps];
  float carry[kScanBlocks * kScanStates * kScanLanes];   // [block, n, lane]: a_{t+1} g_{t+1}
  float sum_da[kScanBlocks * kScanStates * kScanLanes];  // [block, n, lane]
  float sum_skip[kScanBlocks][kScanLanes], sum_bias[kScanBlocks][kScanLanes];
  bool steep[kScanBlocks];
};

struct ScanKernels {
  // [N + 1, 16] of one block: log2(e) A[d, n]; then the largest of a channel's -log2(e) A.
  void (*rates)(const Source& a_log, int64_t D, int64_t N, int64_t block, float* rates);
  // One sequence, one group of channel blocks, all steps.
  void (*forward)(const ScanForwardCall&, int64_t sequence, int64_t group, ScanForwardScratch&);
  void (*backward)(const ScanBackwardCall&, int64_t sequence, int64_t group, ScanBackwardScratch&);
};
namespace avx2 {
extern const ScanKernels scan_kernels;
}
namespace avx512 {
extern const ScanKernels scan_kernels;
}
const ScanKernels& scan_kernels(SimdLevel level);

}  // namespace moemamba
