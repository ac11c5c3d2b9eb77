#include <algorithm>

#include "kernels/cuda/common.cuh"
#include "kernels/state_hash.h"

namespace moemamba {

namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 132 * 8;

__device__ __forceinline__ uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// A thread takes every (grid x block)-th element; one atomic addition of whole numbers a block,
// whose order does not matter. Reads x once: bound by memory, or by its four 64-bit products.
__global__ void __launch_bounds__(kThreads)
    hash(const uint32_t* x, int64_t count, uint64_t key, unsigned long long* sum) {
  const int64_t step = int64_t(gridDim.x) * kThreads;
  uint64_t own = 0;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step)
    own += mix(mix(uint64_t(x[i] + 1)) + key + uint64_t(i) * kHashStride);
  const uint64_t total = block_sum<kThreads>(own);
  if (threadIdx.x == 0) atomicAdd(sum, static_cast<unsigned long long>(total));
}

}  // namespace

void run_cuda(Stream& stream, const StateHash& op) {
  const int64_t count = op.x.elements();
  if (count == 0) return;
  const int64_t blocks = std::min(kMostBlocks, ceil_divide(count, kThreads));
  hash<<<grid_of(blocks), kThreads, 0, native(stream)>>>(
      pointer<const uint32_t>(op.x), count, op.key, pointer<unsigned long long>(op.sum));
  cuda_check(cudaGetLastError(), op.name);
}

}  // namespace moemamba
