#pragma once
#include "kernels/scan.h"

// Ways to cut the forward scan for N in 9 .. 16, for the benchmark to compare.
namespace moemamba::scan {

struct Cut {
  int states;      // of a channel that a thread holds
  int steps;       // computed before their sums are stored
  int min_blocks;  // that share a multiprocessor: bounds the registers
};
inline constexpr Cut kCuts[] = {{4, 2, 4}, {4, 2, 8}, {4, 7, 4}, {8, 1, 4},
                                {8, 2, 4}, {8, 7, 4}, {2, 2, 4}};
inline constexpr int kCutCount = int(sizeof(kCuts) / sizeof(kCuts[0]));

// Which of kCuts forward takes by itself.
int cut_of(int64_t sequences, int64_t channels);
// REQUIRES: 9 <= N <= 16, a checked operator, a stream of a GPU.
void run_cut(Stream& stream, const ScanForward& op, int cut);

}  // namespace moemamba::scan
