#include "kernels/routing.h"

#include <climits>
#include <cmath>

#include "kernels/cuda/routing.cuh"
#include "kernels/gpu_limits.h"

namespace moemamba {

namespace {

using namespace routing;

constexpr int kTokens = 64;         // of one block, all of one routing group
static_assert(kMostExpertsOnGpu <= 1024);  // one thread each when offsets are added up

// Route, and what its kernels hand to one another. letters: P parts = blocks of a routing group.
struct Args {
  Matrix<const float> logits;
  const float* bias;  // or null
  Matrix<float> probabilities, weight;
  Matrix<int32_t> expert, position, counts;
  int32_t *source, *offsets, *flag;
  float *balance, *z;
  double* lse;       // [T] logsumexp of each token
  double* partial;   // [G, P, 2] sums of a part: of q counts, of lse^2
  int32_t* parts_of; // [G, E, P] choices of a part; then: of the group's earlier parts
  int32_t* before;   // [G, E] kept rows of earlier groups
  int64_t groups, tokens, parts;  // G, T / G, P
  int E, K;
  int32_t capacity;
  bool renormalise, sigmoid;
  float scale;

  __device__ int64_t begin(int64_t block) const {  // its first token
    return block / parts * tokens + block % parts * kTokens;
  }
  __device__ int64_t end(int64_t block) const {
    const int64_t last = (block / parts + 1) * tokens, full = begin(block) + kTokens;
    return full < last ? full : last;
  }
};

// The values of one token that a lane holds: those of experts lane, lane + 32, ...
template <int kHeld>
struct Held {
  float at[kHeld];
};

// What the CPU's exp() does, whose argument ends at the smallest normal result. A NaN stays one.
__device__ __forceinline__ float sigmoid_of(float x) {
  if (x >= 0) return 1 / (1 + expf(-x));
  const float y = expf(x < -87.f ? -87.f : x);
  return y / (1 + y);
}

// The scores of one token; returns logsumexp of its logits on every lane.
template <int kHeld>
__device__ double scores_of(const Args& a, const Held<kHeld>& logits, Held<kHeld>& p) {
  float greatest = -INFINITY, sum = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) greatest = fmaxf(greatest, logits.at[i]);
  greatest = warp_max(greatest);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    p.at[i] = lane() + 32 * i < a.E ? expf(logits.at[i] - greatest) : 0.f;
    sum += p.at[i];
  }
  sum = warp_sum(sum);
  const float share = 1 / sum;
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
    p.at[i] = a.sigmoid ? sigmoid_of(logits.at[i]) : p.at[i] * share;
  return double(greatest) + log(double(sum));
}

struct Choice {
  float value, score;
  int expert;
};

// What comes after `last` in the order of choices: greater values first, among equals lower ids.
// Every lane gets it.
template <int kHeld>
__device__ Choice next_choice(int E, const Held<kHeld>& value, const Held<kHeld>& p,
                              const Choice& last) {
  float best = -INFINITY, score = 0;
  int best_e = INT_MAX;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int e = lane() + 32 * i;
    const float v = value.at[i];
    const bool comes = e < E && (v < last.value || (v == last.value && e > last.expert));
    if (comes && (v > best || best_e == INT_MAX)) best = v, best_e = e, score = p.at[i];
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const float v = __shfl_xor_sync(0xffffffffu, best, step);
    const int e = __shfl_xor_sync(0xffffffffu, best_e, step);
    if (v > best || (v == best && e < best_e)) best = v, best_e = e;
  }
  return {best, __shfl_sync(0xffffffffu, score, best_e % 32), best_e};  // its lane still knows
}

// Scores, choices and weights of one token; counts its choices.
template <int kHeld>
__device__ void decide_token(const Args& a, int64_t t, int32_t* histogram) {
  Held<kHeld> value, p;
  const float* logits = a.logits.row(t);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int e = lane() + 32 * i;
    value.at[i] = e < a.E ? logits[e] : -INFINITY;
  }
  const double lse = scores_of(a, value, p);
  if (lane() == 0) a.lse[t] = lse;
  bool nan = false;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int e = lane() + 32 * i;
    if (e >= a.E) continue;
    a.probabilities.row(t)[e] = p.at[i];
    if (a.bias) value.at[i] = p.at[i] + a.bias[e];
    nan |= isnan(value.at[i]);
  }
  nan = __any_sync(0xffffffffu, nan);
  __syncwarp();  // the scores that other lanes have written can be read
  if (nan && lane() == 0) atomicOr(a.flag, 1);
  Choice chosen{.value = INFINITY, .score = 0, .expert = -1};
  float total = a.renormalise ? 0.f : 1.f;
  for (int k = 0; k < a.K; ++k) {
    if (nan)
      chosen = {0, a.probabilities.row(t)[k], k};
    else
      chosen = next_choice(a.E, value, p, chosen);
    if (a.renormalise) total += chosen.score;
    if (lane() != 0) continue;
    a.expert.row(t)[k] = chosen.expert;
    a.weight.row(t)[k] = chosen.score;
    atomicAdd(histogram + chosen.expert, 1);  // of integers: any order gives the same
  }
  __syncwarp();
  for (int k = lane(); k < a.K; k += 32) {
    float& weight = a.weight.row(t)[k];
    weight = weight / total * a.scale;
  }
}

// One block per part of a group, one warp per token, eight tokens a warp. Reads T E logits, writes
// as many scores; held in registers between. Bound by memory for K of one or two, then by the
// K passes of ten shuffles.
template <int kHeld>
__global__ __launch_bounds__(kThreads) void decide(const Args a) {
  extern __shared__ int32_t histogram[];  // [E]
  const int64_t block = blockIdx.x;
  for (int e = threadIdx.x; e < a.E; e += kThreads) histogram[e] = 0;
  __syncthreads();
  for (int64_t t = a.begin(block) + warp(); t < a.end(block); t += kWarps)
    decide_token<kHeld>(a, t, histogram);
  __syncthreads();
  const int64_t g = block / a.parts, part = block % a.parts;
  for (int e = threadIdx.x; e < a.E; e += kThreads)
    a.parts_of[(g * a.E + e) * a.parts + part] = histogram[e];
}

// One warp per (group, expert): counts of parts become those of all earlier parts of the group;
// their sum is the group's count. G E P integers, from L2.
__global__ __launch_bounds__(kThreads) void add_up_parts(const Args a) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + warp();
  if (row >= a.groups * a.E) return;
  int32_t* parts = a.parts_of + row * a.parts;
  int32_t so_far = 0;
  for (int64_t first = 0; first < a.parts; first += 32) {
    const int64_t part = first + lane();
    const int32_t own = part < a.parts ? parts[part] : 0;
    int32_t sum = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int32_t below = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane() >= step) sum += below;
    }
    if (part < a.parts) parts[part] = so_far + sum - own;
    so_far += __shfl_sync(0xffffffffu, sum, 31);
  }
  if (lane() == 0) a.counts.row(row / a.E)[row % a.E] = so_far;
}

// One block, a thread per expert: kept rows of earlier groups, and where each expert's rows begin.
// Reads and writes G E integers.
__global__ __launch_bounds__(1024) void add_up_experts(const Args a) {
  __shared__ int32_t of_warps[32];
  const int e = int(threadIdx.x);
  int32_t kept = 0;
  for (int64_t g = 0; e < a.E && g < a.groups; ++g) {
    a.before[g * a.E + e] = kept;
    kept += min(a.counts.row(g)[e], a.capacity);
  }
  int32_t sum = kept;  // of this warp's experts up to this one
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int32_t below = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane() >= step) sum += below;
  }
  if (lane() == 31) of_warps[warp()] = sum;
  __syncthreads();
  for (int w = 0; w < warp(); ++w) sum += of_warps[w];
  if (e < a.E) a.offsets[e + 1] = sum;
  if (e == 0) a.offsets[0] = 0;
}

// One warp per part: a choice's place among those of its expert in its group, in the order of
// (token, k), and from it its row. 32 choices at a time: those of one expert find one another by
// a match over the warp. Reads 4 T K bytes, writes 8 T K.
__global__ __launch_bounds__(32) void place(const Args a) {
  extern __shared__ int32_t next[];  // [E] of the group: choices of each expert so far
  const int64_t block = blockIdx.x, g = block / a.parts, part = block % a.parts;
  for (int e = lane(); e < a.E; e += 32)
    next[e] = a.parts_of[(g * a.E + e) * a.parts + part];
  __syncwarp();
  const int64_t begin = a.begin(block) * a.K, end = a.end(block) * a.K;
  const int32_t kept_in_all = a.offsets[a.E];
  for (int64_t first = begin; first < end; first += 32) {
    const int64_t item = first + lane(), t = item / a.K;
    const int k = int(item % a.K);
    const bool is_one = item < end;
    const int e = is_one ? a.expert.row(t)[k] : -1;
    const uint32_t same = __match_any_sync(0xffffffffu, e);
    const uint32_t lower = same & ((1u << lane()) - 1);
    const int32_t rank = is_one ? next[e] + __popc(lower) : 0;
    __syncwarp();  // all have read before one writes
    if (is_one && lower == 0) next[e] += __popc(same);
    __syncwarp();
    if (!is_one) continue;  // of the last round alone: nobody waits for this lane any more
    const bool kept = rank < a.capacity;
    const int32_t row = kept ? a.offsets[e] + a.before[g * a.E + e] + rank : -1;
    a.position.row(t)[k] = row;
    if (kept)
      a.source[row] = int32_t(item);
    else
      a.weight.row(t)[k] = 0;
    if (item >= kept_in_all) a.source[item] = -1;  // rows past the end
  }
}

// One block per part, one warp per token: sums of q counts and of lse^2 over the part, in f64 and
// in a fixed order. Reads T E scores again, from L2 mostly.
__global__ __launch_bounds__(kThreads) void losses_of_parts(const Args a) {
  const int64_t block = blockIdx.x;
  const int32_t* counts = a.counts.row(block / a.parts);
  double balance = 0, z = 0;
  for (int64_t t = a.begin(block) + warp(); t < a.end(block); t += kWarps) {
    const float* p = a.probabilities.row(t);
    double along = 0, sum = 0;
    for (int e = lane(); e < a.E; e += 32) {
      along += double(p[e]) * counts[e];
      sum += p[e];
    }
    along = warp_sum(along);
    if (a.sigmoid) along /= warp_sum(sum);  // q = p / sum p
    balance += along;
    z += a.lse[t] * a.lse[t];
  }
  // Every lane of a warp holds the warp's sum.
  balance = block_sum<kThreads>(lane() == 0 ? balance : 0.0);
  z = block_sum<kThreads>(lane() == 0 ? z : 0.0);
  if (threadIdx.x != 0) return;
  a.partial[2 * block] = balance;
  a.partial[2 * block + 1] = z;
}

// One thread per group: its parts in order.
__global__ __launch_bounds__(kThreads) void losses_of_groups(const Args a) {
  const int64_t g = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (g >= a.groups) return;
  double balance = 0, z = 0;
  for (int64_t part = g * a.parts; part < (g + 1) * a.parts; ++part) {
    balance += a.partial[2 * part];
    z += a.partial[2 * part + 1];
  }
  const double n = double(a.tokens);
  a.balance[g] = float(balance * a.E / (n * n * a.K));
  a.z[g] = float(z / n);
}

// Fills the pointers of the scratch; returns its bytes. Called without memory first.
size_t lay_out(Args& a, std::byte* scratch) {
  size_t at = 0;
  const auto take = [&](auto*& field, int64_t count) {
    if (scratch) field = reinterpret_cast<std::remove_reference_t<decltype(field)>>(scratch + at);
    at += size_t(ceil_divide(count * int64_t(sizeof *field), 16) * 16);
  };
  take(a.lse, a.groups * a.tokens);
  take(a.partial, 2 * a.groups * a.parts);
  take(a.parts_of, a.groups * a.E * a.parts);
  take(a.before, a.groups * a.E);
  return at;
}

Args args_of(const Route& op) {
  const int64_t T = op.logits.rows(), E = op.logits.cols(), K = op.expert.cols();
  const int64_t tokens = T / op.groups;
  // As on the CPU: a factor a little below its decimal must not cost a row.
  const double capacity =
      std::floor(op.capacity_factor * double(tokens) * double(K) / double(E) + 1e-9);
  return {.logits = matrix<const float>(op.logits),
          .bias = pointer<const float>(op.bias),
          .probabilities = matrix<float>(op.probabilities),
          .weight = matrix<float>(op.weight),
          .expert = matrix<int32_t>(op.expert),
          .position = matrix<int32_t>(op.position),
          .counts = matrix<int32_t>(op.counts),
          .source = pointer<int32_t>(op.source),
          .offsets = pointer<int32_t>(op.offsets),
          .flag = pointer<int32_t>(op.flag),
          .balance = pointer<float>(op.balance),
          .z = pointer<float>(op.z),
          .groups = op.groups,
          .tokens = tokens,
          .parts = ceil_divide(tokens, kTokens),
          .E = int(E),
          .K = int(K),
          .capacity = op.capacity_factor == 0 || capacity > INT_MAX ? INT_MAX : int32_t(capacity),
          .renormalise = op.renormalise,
          .sigmoid = op.kind == RouterKind::sigmoid,
          .scale = op.scale};
}

void launch_decide(const Args& a, unsigned blocks, size_t shared, cudaStream_t stream) {
  if (a.E <= 32)
    decide<1><<<blocks, kThreads, shared, stream>>>(a);
  else if (a.E <= 64)
    decide<2><<<blocks, kThreads, shared, stream>>>(a);
  else if (a.E <= 256)
    decide<8><<<blocks, kThreads, shared, stream>>>(a);
  else
    decide<32><<<blocks, kThreads, shared, stream>>>(a);
}

}  // namespace

void run_cuda(Stream& stream, const Route& op) {
  fill_zero(stream, op.flag);
  if (op.logits.rows() == 0) {
    for (const Tensor* tensor : {&op.offsets, &op.counts, &op.balance, &op.z})
      fill_zero(stream, *tensor);
    return;
  }
  check(op.logits.cols() <= kMostExpertsOnGpu, op.name, ": a GPU takes at most ", kMostExpertsOnGpu,
        " experts, found ", op.logits.cols());
  Args a = args_of(op);
  lay_out(a, stream.workspace(lay_out(a, nullptr)));
  const unsigned blocks = grid_of(a.groups * a.parts);
  const size_t shared = size_t(a.E) * sizeof(int32_t);
  const auto on = native(stream);
  launch_decide(a, blocks, shared, on);
  add_up_parts<<<grid_of(ceil_divide(a.groups * a.E, kWarps)), kThreads, 0, on>>>(a);
  add_up_experts<<<1, unsigned(ceil_divide(a.E, 32) * 32), 0, on>>>(a);
  place<<<blocks, 32, shared, on>>>(a);
  losses_of_parts<<<blocks, kThreads, 0, on>>>(a);
  losses_of_groups<<<grid_of(ceil_divide(a.groups, kThreads)), kThreads, 0, on>>>(a);
  cuda_check(cudaGetLastError(), op.name);
}

namespace {

// One block. A thread per expert adds the groups' counts, which are whole numbers; two more threads
// add the losses of the groups in their order.
__global__ __launch_bounds__(kThreads) void collect(Matrix<const int32_t> counts,
                                                    const int32_t* offsets, const float* balance,
                                                    const float* z, const int32_t* flag,
                                                    double* choices, double* sums, int64_t G,
                                                    int64_t E) {
  double chosen = 0;
  for (int64_t e = threadIdx.x; e < E; e += kThreads) {
    double sum = choices[e];
    for (int64_t g = 0; g < G; ++g) {
      const double count = counts.row(g)[e];
      sum += count;
      chosen += count;
    }
    choices[e] = sum;
  }
  chosen = block_sum<kThreads>(chosen);
  const bool first = threadIdx.x == 0;
  if (first || threadIdx.x == 32) {
    double sum = sums[first ? 0 : 1];
    for (int64_t g = 0; g < G; ++g) sum += (first ? balance : z)[g];
    sums[first ? 0 : 1] = sum;
  }
  if (threadIdx.x == 64) {
    sums[2] += chosen - offsets[E];
    sums[3] += flag[0];
  }
}

}  // namespace

void run_cuda(Stream& stream, const CollectRouting& op) {
  collect<<<1, kThreads, 0, native(stream)>>>(
      matrix<const int32_t>(op.counts), pointer<const int32_t>(op.offsets),
      pointer<const float>(op.balance), pointer<const float>(op.z),
      pointer<const int32_t>(op.flag), pointer<double>(op.choices), pointer<double>(op.sums),
      op.counts.rows(), op.counts.cols());
  cuda_check(cudaGetLastError(), op.name);
}

}  // namespace moemamba
