#include <bit>
#include <cfloat>

#include "kernels/cuda/cross_entropy.h"
#include "kernels/cuda/grouped_wgmma.cuh"
#include "kernels/cuda/packs.cuh"
#include "kernels/cuda/products.h"

// A logit is needed once, as exp(logit - reference), where the reference is any number near the
// token's greatest logit: the target's own, which one product of rows gives beforehand, is at most
// the token's loss below it. So the product's epilogue raises the f32 sums in its registers, adds
// them up, and stores them once, in bf16:
//   raised[t, v] = exp(logit[t, v] - reference[t]),  sum[t] = sum_v raised[t, v]
//   loss[t] = log(sum[t] / raised[t, target]),  factor[t] = scale / sum[t]
//   dlogits[t, v] = factor[t] (raised[t, v] - (v = target) sum[t])
// The factor is alike for a token's whole row, and so goes to where rows are short: to dx behind
// its product, to x before dweight's. A token whose loss is beyond kMostSum's is done again,
// slowly.
namespace moemamba {

namespace head {

namespace tiles = grouped_wgmma;
using Real = __nv_bfloat16;

// At V = 50304 a chunk has 2048 tokens: dweight is read and written once in so many.
constexpr int64_t kChunkBytes = int64_t{256} << 20;
constexpr int kThreads = 128;  // of the kernels beside the product
constexpr float kLog2e = 1.44269504f;
// Between these (a loss of 55) factors and what they multiply are numbers of full precision. The
// sum of a token that counts is at least 1, but for rounding.
constexpr float kMostSum = 0x1p80f, kLeastSum = 0x1p-80f;

struct Chunk {
  Lines<const Real> x, weight;  // [T, D], [V, D]
  const int32_t* targets;       // [T]
  const float* references;      // [T], times log2(e); infinite where a token is not counted
  float* loss;                  // [T]
  int begin, tokens, V, D;      // begin: the chunk's first token
  int across;                   // tiles of columns
  Lines<Real> raised;           // [tokens, V], rows end on 16
  float* parts;                 // [tokens, across]: sums over a tile's columns
  float* at_target;             // [tokens]: raised, in f32
  float* factors;               // [tokens]
  Lines<Real> scaled;           // [tokens, D]: factor x, rows end on 8
  float scale;
};

__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// to = from where a == b. The compiler would make an index of many such, and put what is indexed
// into memory.
__device__ __forceinline__ void take_if(float& to, int a, int b, float from) {
  asm("{\n.reg .pred p;\nsetp.eq.s32 p, %1, %2;\n@p mov.f32 %0, %3;\n}"
      : "+f"(to)
      : "r"(a), "r"(b), "f"(from));
}

// The whole of a chunk's tiles, tokens first: blocks that run together share columns of weight, so
// that each comes from HBM once.
struct Walk {
  const Chunk& chunk;
  int down, count, index;
  int group = 0, row = 0, col = 0, rows = 0;  // row: of x; rows: left in the chunk from there

  __device__ __forceinline__ explicit Walk(const Chunk& chunk)
      : chunk(chunk),
        down((chunk.tokens + tiles::kRows - 1) / tiles::kRows),
        count(down * chunk.across),
        index(int(blockIdx.x)) {
    find();
  }
  __device__ __forceinline__ bool more() const { return index < count; }
  __device__ __forceinline__ void next() {
    index += int(gridDim.x);
    find();
  }
  __device__ __forceinline__ int stages() const {
    return (chunk.D + tiles::kDepth - 1) / tiles::kDepth;
  }
  __device__ __forceinline__ int cols() const { return chunk.V - col; }
  __device__ __forceinline__ void prefetch(int) const {}

 private:
  __device__ __forceinline__ void find() {
    const int across = index / down, before = (index - across * down) * tiles::kRows;
    col = across * tiles::kCols;
    row = chunk.begin + before;
    rows = chunk.tokens - before;
  }
};

// What becomes of a tile of logits. A lane has two neighbours of each 8 columns, in two rows
// (hopper::multiply_64_256_16), and stores like grouped_wgmma's store().
template <bool kGradients>
struct Raise {
  const Chunk& chunk;

  struct Ahead {
    float reference[2];
    int target[2];  // -1: none
  };
  __device__ __forceinline__ static int row_of(int half) {
    return int(threadIdx.x) / 32 * 16 + half * 8 + int(threadIdx.x) % 32 / 4;
  }
  __device__ __forceinline__ Ahead begin(const Walk& walk) const {
    Ahead ahead{{0, 0}, {-1, -1}};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of(half);
      if (row >= walk.rows) continue;
      ahead.reference[half] = chunk.references[walk.row + row];
      const int target = chunk.targets[walk.row + row];
      if (target >= 0 && target < chunk.V) ahead.target[half] = target;
    }
    return ahead;
  }
  __device__ __forceinline__ void end(const Walk& walk, const Ahead& ahead,
                                      float (&sums)[tiles::kSums]) const {
    const bool counted = ahead.reference[0] < INFINITY && ahead.reference[1] < INFINITY;
    if (walk.cols() < tiles::kCols || !counted) clear(walk, ahead, sums);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of(half);
      const float total = raise(walk, ahead.reference[half], half, sums);
      if (row >= walk.rows) continue;
      const int64_t token = walk.row - chunk.begin + row;
      if (threadIdx.x % 4 == 0) chunk.parts[token * chunk.across + walk.col / tiles::kCols] = total;
      keep_target(ahead.target[half] - walk.col, ahead.reference[half], half, sums,
                  chunk.at_target + token);
    }
    __syncwarp();  // the next products are of whole warps
  }

 private:
  // What does not count becomes exp(-inf): columns that are not there, tokens that are not counted,
  // whose numbers may be none.
  __device__ __forceinline__ static void clear(const Walk& walk, const Ahead& ahead,
                                               float (&sums)[tiles::kSums]) {
#pragma unroll
    for (int i = 0; i < tiles::kSums; ++i) {
      const int col = i / 4 * 8 + int(threadIdx.x) % 4 * 2 + i % 2;
      const bool counted = !(ahead.reference[i / 2 % 2] == INFINITY);
      if (col >= walk.cols() || !counted) sums[i] = -INFINITY;
    }
  }
  // Stores a row's part of the tile; its sum, on all four lanes of the row.
  __device__ __forceinline__ float raise(const Walk& walk, float reference, int half,
                                         const float (&sums)[tiles::kSums]) const {
    const int row = row_of(half);
    Real* const to = chunk.raised.row(walk.row - chunk.begin + row) + walk.col;
    float total[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < tiles::kCols / 8; j += 4) {
      uint32_t part[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int at = (j + n) * 4 + half * 2;
        const float left = exp2_of(fmaf(sums[at], kLog2e, -reference));
        const float right = exp2_of(fmaf(sums[at + 1], kLog2e, -reference));
        total[0] += left;
        total[1] += right;
        const __nv_bfloat162 pair = __floats2bfloat162_rn(left, right);
        part[n] = *reinterpret_cast<const uint32_t*>(&pair);
      }
      if constexpr (kGradients) {
        transpose_quad(part);
        const int col = (j + int(threadIdx.x) % 4) * 8;
        if (row < walk.rows && col < walk.cols())  // all 8: rows end on 16, with zeros
          *reinterpret_cast<uint4*>(to + col) = {part[0], part[1], part[2], part[3]};
      }
    }
    float sum = total[0] + total[1];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    return sum + __shfl_xor_sync(0xffffffffu, sum, 2);
  }
  // Of the lane that has the target's column `at` of the tile, if it is there.
  __device__ __forceinline__ static void keep_target(int at, float reference, int half,
                                                     const float (&sums)[tiles::kSums], float* to) {
    if (at < 0 || at >= tiles::kCols || at / 2 % 4 != int(threadIdx.x) % 4) return;
    const int own = at / 8 * 2 + at % 2;  // among the lane's of this row
    float logit = 0;
#pragma unroll
    for (int i = 0; i < tiles::kSums / 2; ++i)
      take_if(logit, own, i, sums[i / 2 * 4 + half * 2 + i % 2]);
    *to = exp2_of(fmaf(logit, kLog2e, -reference));
  }
};

namespace {

// raised, parts and at_target of a chunk; without gradients, no raised. One block per
// multiprocessor, as in grouped_wgmma. Reads x from L2, weight once, writes raised once: bound by
// the tensor cores and, while a tile is raised, by the exp2 unit (2,048 cycles beside 8,192 at
// D = 512).
template <bool kGradients>
__global__ void __launch_bounds__(tiles::kThreads, 1)
    raise_logits(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap weight,
                 const __grid_constant__ Chunk chunk) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) std::byte memory[];
  __shared__ __align__(8) uint64_t barriers[2 * tiles::kStages];
  const tiles::Ring ring = tiles::start_ring(memory, barriers);
  __syncthreads();
  tiles::share_work<GroupedKind::matmul_b_transposed>(x, weight, Walk(chunk), ring, memory,
                                                      Raise<kGradients>{chunk});
#endif
}

// The product of two rows: this lane's part of a warp's, or a thread's whole (kStep = 8).
template <int kStep>
__device__ __forceinline__ float product(const Real* a, const Real* b, int D, int first) {
  float sum = 0;
  for (int column = first; column < D; column += kStep) {
    float left[8], right[8];
    load<8>(a + column, D - column, left);
    load<8>(b + column, D - column, right);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(left[i], right[i], sum);
  }
  return sum;
}

// A warp per token: its reference. Reads x and a row of weight for each: bound by HBM.
__global__ void __launch_bounds__(kThreads)
    find_references(Lines<const Real> x, Lines<const Real> weight, const int32_t* targets,
                    float* references, int T, int V, int D) {
  const int64_t t = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (t >= T) return;
  const int lane = int(threadIdx.x) % 32, target = targets[t];
  float sum = 0;
  if (target >= 0 && target < V) sum = product<256>(x.row(t), weight.row(target), D, lane * 8);
  sum = warp_sum(sum);
  if (lane == 0) references[t] = target == -1 ? INFINITY : sum * kLog2e;
}

struct Row {
  float sum, at_target, loss;
};

// A token beyond the range, from its logits once more, with their greatest as the reference. By a
// block: about a millisecond for each of them.
template <bool kGradients>
__device__ __forceinline__ Row do_again(const Chunk& chunk, int token, int target) {
  __shared__ float parts[kThreads / 32];
  const Real* const x = chunk.x.row(chunk.begin + token);
  const auto logit_of = [&](int v) { return product<8>(x, chunk.weight.row(v), chunk.D, 0); };
  float greatest = -FLT_MAX;
  for (int v = int(threadIdx.x); v < chunk.V; v += kThreads)
    greatest = fmaxf(greatest, logit_of(v));
  greatest = warp_max(greatest);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = greatest;
  __syncthreads();
#pragma unroll
  for (float part : parts) greatest = fmaxf(greatest, part);
  float sum = 0;
  for (int v = int(threadIdx.x); v < chunk.V; v += kThreads) {
    const float raised = exp2_of((logit_of(v) - greatest) * kLog2e);
    sum += raised;
    if (kGradients) chunk.raised.row(token)[v] = from_float<Real>(raised);
  }
  sum = block_sum<kThreads>(sum);  // its barriers are behind the stores, too
  const bool known = target >= 0 && target < chunk.V;
  const float below = known ? logit_of(target) - greatest : NAN;
  return {sum, exp2_of(below * kLog2e), logf(sum) - below};
}

// A block per token: loss and factor from the tiles' sums, in their order; what the target's own
// logit has beside; x times factor. Reads and writes little beside the product.
template <bool kGradients>
__global__ void __launch_bounds__(kThreads) finish_rows(const __grid_constant__ Chunk chunk) {
  const int token = int(blockIdx.x), target = chunk.targets[chunk.begin + token];
  float sum = 0;
  for (int i = int(threadIdx.x); i < chunk.across; i += kThreads)
    sum += chunk.parts[int64_t(token) * chunk.across + i];
  Row row{.sum = block_sum<kThreads>(sum), .at_target = NAN, .loss = 0};
  // An id outside of the vocabulary shows as a loss that is no number; it never is an index.
  const bool counted = target != -1, known = target >= 0 && target < chunk.V;
  if (known) row.at_target = chunk.at_target[token];
  if (counted) row.loss = logf(row.sum / row.at_target);
  const bool beyond =  // not NaN, which stays what it is
      row.sum > kMostSum || row.sum < kLeastSum || row.at_target < kLeastSum;
  if (counted && beyond) row = do_again<kGradients>(chunk, token, target);  // the whole block
  const float factor = counted ? chunk.scale / row.sum : 0.f;
  if (threadIdx.x == 0) {
    chunk.loss[chunk.begin + token] = row.loss;
    if (kGradients) chunk.factors[token] = factor;
    if (kGradients && known)
      chunk.raised.row(token)[target] = from_float<Real>(row.at_target - row.sum);
  }
  const int scaled = kGradients ? chunk.D : 0;
  for (int column = int(threadIdx.x) * 8; column < scaled; column += kThreads * 8) {
    float x[8];
    load<8>(chunk.x.row(chunk.begin + token) + column, chunk.D - column, x);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = counted ? x[i] * factor : 0.f;
    store<8>(chunk.scaled.row(token) + column, Whole(), x);  // rows end on 8, with zeros
  }
}

// dx = factor sums, a warp per token. `wide`: rows of dx begin on 16-byte borders.
__global__ void __launch_bounds__(kThreads)
    scale_rows(Lines<const float> sums, const float* factors, Lines<Real> dx, int tokens, int D,
               bool wide) {
  const int64_t t = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (t >= tokens) return;
  const float factor = factors[t];
  for (int column = int(threadIdx.x) % 32 * 8; column < D; column += 256) {
    float row[8];
    load<8>(sums.row(t) + column, D - column, row);
#pragma unroll
    for (float& number : row) number *= factor;
    if (wide) {
      store<8>(dx.row(t) + column, D - column, row);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (column + i < D) dx.row(t)[column + i] = from_float<Real>(row[i]);
    }
  }
}

// What a call takes of the stream's workspace.
struct Memory {
  int64_t T, V, D, tokens, across;  // tokens: of a chunk
  std::byte* start;
  int64_t bytes = 0;
  int64_t references, raised, parts, at_target, factors, scaled, sums;  // where each begins

  Memory(const HeadCrossEntropy& op)
      : T(op.x.rows()), V(op.weight.rows()), D(op.x.cols()), across(ceil_divide(V, tiles::kCols)) {
    // A power of two: batches are cut into chunks of one size, the one that is tuned.
    const auto fit = std::bit_floor(uint64_t(kChunkBytes / (2 * raised_stride())));
    tokens = std::min<int64_t>(T, std::max<int64_t>(int64_t(fit), tiles::kRows));
    const auto take = [&](int64_t size) {
      const int64_t at = bytes;
      bytes += (size + 255) / 256 * 256;
      return at;
    };
    references = take(T * 4);
    parts = take(tokens * across * 4);
    at_target = take(tokens * 4);
    if (!op.dx) return;
    factors = take(tokens * 4);
    scaled = take(tokens * scaled_stride() * 2);
    sums = take(tokens * sums_stride() * 4);
    raised = take(tokens * raised_stride() * 2);
  }
  int64_t raised_stride() const { return ceil_divide(V, 16) * 16; }
  int64_t scaled_stride() const { return ceil_divide(D, 8) * 8; }
  int64_t sums_stride() const { return ceil_divide(D, 8) * 8; }
  template <class Number>
  Number* at(int64_t place) const {
    return reinterpret_cast<Number*>(start + place);
  }

  Tensor tensor(int64_t place, Shape shape, DType dtype, int64_t stride) const {
    Tensor tensor = view(start + place, shape, dtype, DeviceKind::cuda);
    tensor.stride = stride;
    return tensor;
  }
};

Chunk chunk_of(const HeadCrossEntropy& op, const Memory& memory, int64_t begin) {
  Chunk chunk{.x = lines<const Real>(op.x),
              .weight = lines<const Real>(op.weight),
              .targets = pointer<const int32_t>(op.targets),
              .references = memory.at<float>(memory.references),
              .loss = pointer<float>(op.loss),
              .begin = int(begin),
              .tokens = int(std::min(memory.tokens, memory.T - begin)),
              .V = int(memory.V),
              .D = int(memory.D),
              .across = int(memory.across),
              .raised = {},
              .parts = memory.at<float>(memory.parts),
              .at_target = memory.at<float>(memory.at_target),
              .factors = nullptr,
              .scaled = {},
              .scale = op.scale};
  if (!op.dx) return chunk;
  chunk.raised = {memory.at<Real>(memory.raised), memory.raised_stride()};
  chunk.factors = memory.at<float>(memory.factors);
  chunk.scaled = {memory.at<Real>(memory.scaled), memory.scaled_stride()};
  return chunk;
}

struct Products {
  Matmul dx, dweight;
};

Products products_of(const HeadCrossEntropy& op, const Memory& memory, int64_t begin) {
  const int64_t tokens = std::min(memory.tokens, memory.T - begin);
  const Tensor raised =
      memory.tensor(memory.raised, {tokens, memory.V}, DType::bf16, memory.raised_stride());
  return {.dx = {.a = raised,
                 .b = op.weight,
                 .out = memory.tensor(memory.sums, {tokens, memory.D}, DType::f32,
                                      memory.sums_stride())},
          .dweight = {.a = raised,
                      .b = memory.tensor(memory.scaled, {tokens, memory.D}, DType::bf16,
                                         memory.scaled_stride()),
                      .out = op.dweight,
                      .a_transposed = true,
                      .accumulate = op.accumulate || begin > 0}};
}

struct Maps {
  CUtensorMap x, weight;
};

template <bool kGradients>
void raise_and_finish(Stream& stream, const Maps& maps, const Chunk& chunk) {
  const auto kernel = raise_logits<kGradients>;
  const size_t bytes = tiles::shared_bytes(0);
  cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)),
             "cudaFuncSetAttribute");
  const int64_t count = ceil_divide(chunk.tokens, tiles::kRows) * chunk.across;
  const unsigned blocks = grid_of(std::min<int64_t>(count, multiprocessors()));
  kernel<<<blocks, tiles::kThreads, bytes, native(stream)>>>(maps.x, maps.weight, chunk);
  finish_rows<kGradients><<<grid_of(chunk.tokens), kThreads, 0, native(stream)>>>(chunk);
  cuda_check(cudaGetLastError(), HeadCrossEntropy::name);
}

void run_chunk(Stream& stream, const HeadCrossEntropy& op, const Memory& memory, const Maps& maps,
               int64_t begin) {
  const Chunk chunk = chunk_of(op, memory, begin);
  if (!op.dx) return raise_and_finish<false>(stream, maps, chunk);
  raise_and_finish<true>(stream, maps, chunk);
  const Products products = products_of(op, memory, begin);
  for (const Matmul* product : {&products.dx, &products.dweight})
    check(multiply_by_blas(stream, *product), op.name, ": cuBLASLt took a product, and then not");
  const Tensor dx = op.dx.row_range(begin, begin + chunk.tokens);
  scale_rows<<<grid_of(ceil_divide(chunk.tokens, kThreads / 32)), kThreads, 0, native(stream)>>>(
      {memory.at<const float>(memory.sums), memory.sums_stride()}, chunk.factors, lines<Real>(dx),
      chunk.tokens, chunk.D, rows_aligned(dx));
  cuda_check(cudaGetLastError(), op.name);
}

}  // namespace
}  // namespace head

bool run_head_by_wgmma(Stream& stream, const HeadCrossEntropy& op) {
  if (op.x.dtype != DType::bf16 || !rows_aligned(op.x) || !rows_aligned(op.weight) ||
      !hopper::runs_here(head::raise_logits<true>))
    return false;
  head::Memory memory(op);
  check(memory.T < INT32_MAX / 2, op.name, ": x[T, D] may have 2^30 rows, found ",
        to_string(op.x.shape));
  memory.start = stream.workspace(size_t(memory.bytes));
  if (op.dx)
    for (int64_t begin : {int64_t{0}, (memory.T - 1) / memory.tokens * memory.tokens}) {
      const head::Products products = head::products_of(op, memory, begin);
      if (!blas_takes(stream, products.dx) || !blas_takes(stream, products.dweight)) return false;
    }
  const auto map = [](const Tensor& tensor, int box_rows) {
    return hopper::tensor_map(tensor, 1, uint64_t(tensor.rows()), grouped_wgmma::kBoxCols,
                              uint32_t(box_rows));
  };
  const head::Maps maps{
      .x = map(op.x, grouped_wgmma::a_box_rows(GroupedKind::matmul_b_transposed)),
      .weight = map(op.weight, grouped_wgmma::b_box_rows(GroupedKind::matmul_b_transposed))};
  head::find_references<<<grid_of(ceil_divide(memory.T, head::kThreads / 32)), head::kThreads, 0,
                          native(stream)>>>(
      lines<const head::Real>(op.x), lines<const head::Real>(op.weight),
      pointer<const int32_t>(op.targets), memory.at<float>(memory.references), int(memory.T),
      int(memory.V), int(memory.D));
  cuda_check(cudaGetLastError(), op.name);
  for (int64_t begin = 0; begin < memory.T; begin += memory.tokens)
    head::run_chunk(stream, op, memory, maps, begin);
  return true;
}

}  // namespace moemamba
