#include "kernels/cuda/starts.cuh"

namespace moemamba {

namespace {

constexpr int kThreads = 1024;

// The greatest of x over this and all lower lanes.
__device__ __forceinline__ int32_t running_max(int32_t x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int32_t below = __shfl_up_sync(0xffffffffu, x, step);
    if (int(threadIdx.x) % 32 >= step) x = max(x, below);
  }
  return x;
}

// A block per sequence, which goes through its tokens kThreads at a time. Latency binds: about two
// barriers for every 1024 tokens.
__global__ void __launch_bounds__(kThreads) find(const uint8_t* starts, int32_t* first,
                                                 int32_t none, int64_t offset, int64_t L,
                                                 int32_t* newest) {
  __shared__ int32_t greatest[kThreads / 32];
  const int64_t row = int64_t(blockIdx.x) * L;
  int32_t seen = first ? first[blockIdx.x] : none;  // before these tokens
  for (int64_t begin = 0; begin < L; begin += kThreads) {
    const int64_t place = begin + threadIdx.x;
    const bool is_start = place < L && starts && starts[row + place];
    const int32_t here = running_max(is_start ? int32_t(offset + place) : -1);
    if (threadIdx.x % 32 == 31) greatest[threadIdx.x / 32] = here;
    __syncthreads();
    int32_t all = -1, before = -1;  // of all warps, of those before this one
    for (int w = 0; w < kThreads / 32; ++w) {
      if (w == int(threadIdx.x) / 32) before = all;
      all = max(all, greatest[w]);
    }
    const int32_t start = max(here, before);
    if (place < L) newest[row + place] = start >= 0 ? start : seen;
    if (all >= 0) seen = all;
    __syncthreads();
  }
  if (first && threadIdx.x == 0) first[blockIdx.x] = seen;
}

}  // namespace

void find_starts(Stream& stream, const Starts& s, int32_t* newest) {
  if (s.B * s.L == 0) return;
  find<<<grid_of(s.B), kThreads, 0, native(stream)>>>(pointer<uint8_t>(s.starts), s.first, s.none,
                                                      s.offset, s.L, newest);
  cuda_check(cudaGetLastError(), "find_starts");
}

}  // namespace moemamba
