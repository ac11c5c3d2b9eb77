#include "kernels/cuda/sums.cuh"

#include "kernels/cuda/packs.cuh"

namespace moemamba {

namespace {

constexpr int kGroups = 32;        // of parts that are summed side by side
constexpr int kThreads = 256;
constexpr int64_t kBlock = 16384;  // elements that a block of sum_block() adds

// A block has 32 columns; group g (a warp) of it adds parts g, g + 32 .. in order, then the groups
// are added in order. Reads the parts once; the latency of blocks / 32 dependent rounds binds.
__global__ void __launch_bounds__(32 * kGroups)
    add_parts(const float* parts, int64_t blocks, int64_t columns, ColumnSums to, bool accumulate) {
  __shared__ float sums[kGroups][32];
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32;
  const int64_t column = int64_t(blockIdx.x) * 32 + lane;
  float total = 0;
  if (column < columns) {
#pragma unroll 8
    for (int64_t b = group; b < blocks; b += kGroups) total += parts[b * columns + column];
  }
  sums[group][lane] = total;
  __syncthreads();
  if (group > 0 || column >= columns) return;
  float* out = column < to.split ? to.first + column : to.second + (column - to.split);
  total = accumulate ? *out : 0.f;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) total += sums[g][lane];
  *out = total;
}

// Every thread's terms of the block from `begin`, in kCount chains of additions. kWhole: all of the
// block's elements exist.
template <int kCount, Term kTerm, bool kWhole>
__device__ __forceinline__ double thread_terms(const float* x, int64_t count) {
  double totals[kCount] = {};
#pragma unroll 4
  for (int i = int(threadIdx.x) * kCount; i < kBlock; i += kThreads * kCount) {
    float values[kCount];
    if constexpr (kWhole) load<kCount>(x + i, Whole(), values);
    else load<kCount>(x + i, count - i, values);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const double value = double(values[j]);
      totals[j] += kTerm == Term::square ? value * value : value;
    }
  }
  double total = 0;
#pragma unroll
  for (int j = 0; j < kCount; ++j) total += totals[j];
  return total;
}

// Block b adds the terms of its kBlock elements. Reads x once, 4 bytes an element: bound by memory.
template <int kCount, Term kTerm>
__global__ void __launch_bounds__(kThreads) sum_block(const float* x, int64_t P, double* parts) {
  const int64_t begin = int64_t(blockIdx.x) * kBlock, count = P - begin;
  double total = count >= kBlock ? thread_terms<kCount, kTerm, true>(x + begin, count)
                                 : thread_terms<kCount, kTerm, false>(x + begin, count);
  total = block_sum<kThreads>(total);
  if (threadIdx.x == 0) parts[blockIdx.x] = total;
}

// One block adds the parts; 2^31 elements have 131,072 of them.
__global__ void __launch_bounds__(1024)
    sum_total(const double* parts, int64_t blocks, double* sum, bool accumulate) {
  double total = 0;
#pragma unroll 4
  for (int64_t b = threadIdx.x; b < blocks; b += 1024) total += parts[b];
  total = block_sum<1024>(total);
  if (threadIdx.x == 0) *sum = accumulate ? *sum + total : total;
}

template <Term kTerm>
void launch_sum_block(Stream& stream, const Tensor& x, int64_t blocks, double* parts) {
  const auto kernel = rows_aligned(x) ? sum_block<4, kTerm> : sum_block<1, kTerm>;
  kernel<<<grid_of(blocks), kThreads, 0, native(stream)>>>(pointer<float>(x), x.elements(), parts);
  cuda_check(cudaGetLastError(), "sum");
}

}  // namespace

void sum_parts(Stream& stream, const float* parts, int64_t blocks, int64_t columns, ColumnSums to,
               bool accumulate) {
  if (columns == 0) return;
  add_parts<<<grid_of(ceil_divide(columns, 32)), 32 * kGroups, 0, native(stream)>>>(
      parts, blocks, columns, to, accumulate);
  cuda_check(cudaGetLastError(), "sum_parts");
}

void sum_terms(Stream& stream, const Tensor& x, const Tensor& sum, Term term, bool accumulate) {
  const int64_t blocks = ceil_divide(x.elements(), kBlock);
  double* parts = nullptr;
  if (blocks > 0) {
    parts = reinterpret_cast<double*>(stream.workspace(size_t(blocks) * sizeof(double)));
    if (term == Term::square) launch_sum_block<Term::square>(stream, x, blocks, parts);
    else launch_sum_block<Term::value>(stream, x, blocks, parts);
  }
  sum_total<<<1, 1024, 0, native(stream)>>>(parts, blocks, pointer<double>(sum), accumulate);
  cuda_check(cudaGetLastError(), "sum");
}

}  // namespace moemamba
