#include "kernels/cuda/cross_entropy.h"

#include <cfloat>

#include "kernels/cuda/common.cuh"
#include "kernels/cuda/products.h"

namespace moemamba {

namespace {

// Logits of a chunk of tokens, in f32: in bf16 one of 20 would be off by up to 0.06, and its
// probability by as much. At V = 50304 a chunk has 1280 tokens, so that dweight is read and written
// once in 1280 tokens.
constexpr int64_t kLogitsBytes = int64_t{256} << 20;
constexpr int64_t kSmallVocabulary = 4096;

// Elements from one token's logits to the next one's.
int64_t logits_stride(int64_t V) { return ceil_divide(V, 16) * 16; }

int64_t chunk_tokens(int64_t T, int64_t V) {
  const int64_t fit = kLogitsBytes / (logits_stride(V) * int64_t(sizeof(float)));
  return std::min(T, std::max<int64_t>(fit / 128 * 128, 128));
}

// Where a token's gradient starts in its row of logits: bf16 ones fill the upper half.
template <class Real>
__host__ __device__ constexpr int64_t gradient_offset(int64_t stride) {
  return sizeof(Real) == sizeof(float) ? 0 : stride / 2;
}

struct Loss {
  float* logits;  // [tokens, V]; with gradients, overwritten by dlogits
  int64_t stride;
  const int32_t* targets;
  float* loss;
  int V;
  float scale;
};

// Four logits from 4 i on; what is past the last one takes no part in a maximum or a sum.
__device__ __forceinline__ Pack<float> logits_at(const float* logits, int i, int V) {
  if (i * 4 + 4 <= V) return reinterpret_cast<const Pack<float>*>(logits)[i];
  Pack<float> pack;
#pragma unroll
  for (int j = 0; j < 4; ++j) pack.at[j] = i * 4 + j < V ? logits[i * 4 + j] : -INFINITY;
  return pack;
}

__device__ __forceinline__ float exponential(float x) { return exp2f(x * 1.44269504f); }

template <int kThreads>
__device__ float block_max(float x) {
  __shared__ float parts[kThreads / 32];
  x = warp_max(x);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  for (int w = 0; w < kThreads / 32; ++w) x = fmaxf(x, parts[w]);
  return x;
}

// The greatest logit, and the sum of exp(logit - greatest), on every thread. One pass: a thread's
// sum moves to each new maximum. A NaN is in the sum.
template <int kThreads>
__device__ float2 greatest_and_sum(const float* logits, int V) {
  float greatest = -FLT_MAX, sum = 0;
  for (int i = threadIdx.x; i < (V + 3) / 4; i += kThreads) {
    const Pack<float> pack = logits_at(logits, i, V);
    float more = greatest;
#pragma unroll
    for (int j = 0; j < 4; ++j) more = fmaxf(more, pack.at[j]);
    sum *= exponential(greatest - more);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum += exponential(pack.at[j] - more);
    greatest = more;
  }
  const float all = block_max<kThreads>(greatest);
  return {all, block_sum<kThreads>(sum * exponential(greatest - all))};
}

// Replaces a token's logits by scale (softmax - onehot), or by zeros where it is not counted. From
// the last logit to the first: gradients in bf16 lie above the logits that are still to be read,
// and the barrier is between the reads and the writes of one round.
template <class Real, int kThreads>
__device__ void write_gradients(const Loss& op, float* logits, int target, float greatest,
                                float factor) {
  const int packs = (op.V + 3) / 4, rounds = (packs + kThreads - 1) / kThreads;
  Real* to = reinterpret_cast<Real*>(logits + gradient_offset<Real>(op.stride));
  for (int round = rounds - 1; round >= 0; --round) {
    const int i = round * kThreads + int(threadIdx.x);
    Pack<float> pack{};
    if (i < packs && target >= 0) pack = logits_at(logits, i, op.V);
    if constexpr (sizeof(Real) < sizeof(float)) __syncthreads();
    if (i >= packs) continue;
    Pack<Real, 4> out;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float gradient = target < 0 ? 0.f : exponential(pack.at[j] - greatest) * factor;
      if (i * 4 + j == target) gradient -= op.scale;
      out.at[j] = from_float<Real>(gradient);
    }
    reinterpret_cast<Pack<Real, 4>*>(to)[i] = out;  // rows end on whole packs
  }
}

// A block per token. Logits are read twice, the second time backwards, so mostly from L2; dlogits
// are written once. Bound by HBM.
template <class Real, int kThreads, bool kGradients>
__global__ void __launch_bounds__(kThreads) cross_entropy(Loss op) {
  float* logits = op.logits + int64_t(blockIdx.x) * op.stride;
  const int target = op.targets[blockIdx.x];
  if (target == -1) {  // of the whole block
    if (threadIdx.x == 0) op.loss[blockIdx.x] = 0;
    if constexpr (kGradients) write_gradients<Real, kThreads>(op, logits, target, 0, 0);
    return;
  }
  // An id outside of the vocabulary shows as a loss that is no number; it never is an index.
  const float at_target = target >= 0 && target < op.V ? logits[target] : NAN;
  const float2 row = greatest_and_sum<kThreads>(logits, op.V);
  if (threadIdx.x == 0) op.loss[blockIdx.x] = logf(row.y) + (row.x - at_target);
  if constexpr (kGradients)
    write_gradients<Real, kThreads>(op, logits, target, row.x, op.scale / row.y);
}

template <class Real, bool kGradients>
void take_loss(Stream& stream, const Loss& loss, int64_t tokens) {
  if (loss.V <= kSmallVocabulary)
    cross_entropy<Real, 128, kGradients><<<grid_of(tokens), 128, 0, native(stream)>>>(loss);
  else
    cross_entropy<Real, 1024, kGradients><<<grid_of(tokens), 1024, 0, native(stream)>>>(loss);
  cuda_check(cudaGetLastError(), HeadCrossEntropy::name);
}

// The three products of a chunk of tokens.
struct Products {
  Matmul logits, dx, dweight;
};

Products products_of(const HeadCrossEntropy& op, std::byte* memory, int64_t begin, int64_t end) {
  const int64_t V = op.weight.rows(), stride = logits_stride(V);
  const Tensor x = op.x.row_range(begin, end);
  Tensor logits = view(memory, {end - begin, V}, DType::f32, DeviceKind::cuda), dlogits = logits;
  logits.stride = dlogits.stride = stride;
  Products products{.logits = {.a = x, .b = op.weight, .out = logits, .b_transposed = true}};
  if (!op.dx) return products;
  if (op.x.dtype == DType::bf16) {
    dlogits.data = memory + gradient_offset<__nv_bfloat16>(stride) * int64_t(sizeof(float));
    dlogits.dtype = DType::bf16;
    dlogits.stride = 2 * stride;
  }
  products.dx = {.a = dlogits, .b = op.weight, .out = op.dx.row_range(begin, end)};
  products.dweight = {.a = dlogits,
                      .b = x,
                      .out = op.dweight,
                      .a_transposed = true,
                      .accumulate = op.accumulate || begin > 0};
  return products;
}

// Calls body(products, begin) for every chunk of tokens.
template <class Body>
void for_chunks(const HeadCrossEntropy& op, std::byte* memory, const Body& body) {
  const int64_t T = op.x.rows(), tokens = chunk_tokens(T, op.weight.rows());
  for (int64_t begin = 0; begin < T; begin += tokens)
    body(products_of(op, memory, begin, std::min(T, begin + tokens)), begin);
}

// What products that cuBLASLt does not take as they are (odd strides of bf16) need beside.
int64_t scratch_bytes(Stream& stream, const HeadCrossEntropy& op, std::byte* memory) {
  int64_t bytes = 0;
  for_chunks(op, memory, [&](const Products& products, int64_t) {
    for (const Matmul* product : {&products.logits, &products.dx, &products.dweight})
      if (product->out && !blas_takes(stream, *product))
        bytes = std::max(bytes, widened_bytes(*product));
  });
  return bytes;
}

template <class Real>
void run_chunk(Stream& stream, const HeadCrossEntropy& op, const Products& products,
               std::byte* scratch, int64_t begin) {
  const auto multiply = [&](const Matmul& product) {
    if (!multiply_by_blas(stream, product)) multiply_widened(stream, product, scratch);
  };
  multiply(products.logits);
  const Loss loss{.logits = pointer<float>(products.logits.out),
                  .stride = products.logits.out.stride,
                  .targets = pointer<int32_t>(op.targets) + begin,
                  .loss = pointer<float>(op.loss) + begin,
                  .V = int(op.weight.rows()),
                  .scale = op.scale};
  const int64_t tokens = products.logits.out.rows();
  if (!op.dx) return take_loss<Real, false>(stream, loss, tokens);
  take_loss<Real, true>(stream, loss, tokens);
  multiply(products.dx);
  multiply(products.dweight);
}

}  // namespace

void run_head_by_blas(Stream& stream, const HeadCrossEntropy& op) {
  const int64_t T = op.x.rows(), V = op.weight.rows();
  const int64_t bytes = chunk_tokens(T, V) * logits_stride(V) * int64_t(sizeof(float));
  std::byte* memory = stream.workspace(size_t(bytes));
  const int64_t more = scratch_bytes(stream, op, memory);
  if (more > 0) memory = stream.workspace(size_t(bytes + more));
  for_chunks(op, memory, [&](const Products& products, int64_t begin) {
    visit_real(op.x.dtype,
               [&]<class Real>() { run_chunk<Real>(stream, op, products, memory + bytes, begin); });
  });
}

void run_cuda(Stream& stream, const HeadCrossEntropy& op) {
  const int64_t T = op.x.rows(), V = op.weight.rows();
  check(V < INT32_MAX / 2, op.name, ": weight[V, D] may have 2^30 rows, found ",
        to_string(op.weight.shape));
  if (T == 0) {
    if (op.dweight && !op.accumulate) fill_zero(stream, op.dweight);
    return;
  }
  if (!run_head_by_wgmma(stream, op)) run_head_by_blas(stream, op);
}

}  // namespace moemamba
