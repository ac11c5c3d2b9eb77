#include "kernels/cuda/attention_tiles.cuh"

namespace moemamba {

namespace {

template <class Real>
struct BackwardCall {
  AttentionShape shape;
  Lines<Real> qkv, y, dy, dqkv;
  Lines<float> lse;
  float* delta;  // [T, H]: dy . y
  int64_t T, tiles;

  // Rows of one sequence's head; heads of qkv count through q, k and v.
  __device__ Head<const Real> input(int64_t row, int head) const {
    return {qkv.row(row) + head * shape.dh, qkv.stride};
  }
  __device__ Head<Real> gradient(int64_t row, int head) const {
    return {dqkv.row(row) + head * shape.dh, dqkv.stride};
  }
  __device__ Head<const Real> upstream(int64_t row, int head) const {
    return {dy.row(row) + head * shape.dh, dy.stride};
  }
};

// A warp per token and head. Reads y and dy once: bound by memory.
template <class Real>
__global__ void __launch_bounds__(kAttentionThreads) find_delta(BackwardCall<Real> call) {
  const int64_t at = (int64_t(blockIdx.x) * kAttentionThreads + threadIdx.x) / 32;
  if (at >= call.T * call.shape.H) return;  // the whole warp
  const Place place = place_of(at, call.shape.H);
  const int64_t column = place.column * call.shape.dh;
  float sum = 0;
  for (int d = threadIdx.x % 32; d < call.shape.dh; d += 32)
    sum = fmaf(to_float(call.y.row(place.row)[column + d]),
               to_float(call.dy.row(place.row)[column + d]), sum);
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) call.delta[at] = sum;
}

// What a token's row of scores needs to become probabilities and their gradients.
struct QueryFacts {
  int first = 0, place = -1;  // the keys that it sees: first .. place
  float lse = 0, delta = 0;
};
template <class Real>
__device__ __forceinline__ QueryFacts query_facts(const BackwardCall<Real>& call, int64_t row,
                                                  int64_t place, int head) {
  if (place >= call.shape.L) return {};
  const int64_t t = row + place;
  return {call.shape.firsts[t], int(place), call.lse.row(t)[head],
          call.delta[t * call.shape.H + head]};
}

// From q . k and dy . v the probability p and the gradient of q . k; 0 where not visible.
__device__ __forceinline__ void soften_backward(const QueryFacts& query, int key, float scale,
                                                float& score, float& dscore) {
  const bool visible = query.first <= key && key <= query.place;
  const float p = visible ? exp2f((score * scale - query.lse) * kLog2e) : 0.f;
  score = p;
  dscore = visible ? scale * p * (dscore - query.delta) : 0.f;
}

template <int kRows, int kWidth>
constexpr size_t kBackwardShared =
    sizeof(float) *
    ((2 * 16 * kRows + 2 * kOthers) * kTileStride<kWidth> + 2 * 16 * kRows * kWeightStride);

// Views of the block's shared memory: two tiles of own rows, two of others, two of weights.
template <int kRows, int kWidth>
struct BackwardMemory {
  float *own, *own_other, *others, *others_other, *weights, *dweights;
  __device__ explicit BackwardMemory(float* memory)
      : own(memory),
        own_other(own + 16 * kRows * kTileStride<kWidth>),
        others(own_other + 16 * kRows * kTileStride<kWidth>),
        others_other(others + kOthers * kTileStride<kWidth>),
        weights(others_other + kOthers * kTileStride<kWidth>),
        dweights(weights + 16 * kRows * kWeightStride) {}
};

// dq. A block takes 16 kRows queries of one head and goes through their visible keys in order.
// Bound by f32 multiplications, 6 dh for each visible pair.
template <int kRows, int kWidth, class Real>
__global__ void __launch_bounds__(kAttentionThreads, 1) backward_queries(BackwardCall<Real> call) {
  extern __shared__ float4 memory[];
  const BackwardMemory<kRows, kWidth> m(reinterpret_cast<float*>(memory));
  const AttentionShape& s = call.shape;
  const int64_t tile = blockIdx.x % call.tiles, pair = blockIdx.x / call.tiles;
  const int head = int(pair % s.H), kv_head = head / (s.H / s.Hkv);
  const int64_t row = pair / s.H * s.L;
  const int64_t begin = tile * 16 * kRows, end = min(s.L, begin + 16 * kRows);
  load_tile<16 * kRows, kWidth>(call.input(row, head), begin, end, s.dh, m.own);
  load_tile<16 * kRows, kWidth>(call.upstream(row, head), begin, end, s.dh, m.own_other);
  QueryFacts queries[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    queries[r] = query_facts(call, row, begin + own_row<kRows>(r), head);
  RowSums<kRows, kWidth> dq;
  clear(dq);
  for (int at = s.firsts[row + begin]; at < end; at += kOthers) {
    __syncthreads();  // the last tile's readers are done
    load_tile<kOthers, kWidth>(call.input(row, s.H + kv_head), at, end, s.dh, m.others);
    load_tile<kOthers, kWidth>(call.input(row, s.H + s.Hkv + kv_head), at, end, s.dh,
                               m.others_other);
    __syncthreads();
    float scores[kRows][2], dscores[kRows][2];
    multiply_rows<kRows, kWidth>(m.own, m.others, scores);
    multiply_rows<kRows, kWidth>(m.own_other, m.others_other, dscores);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < 2; ++c)
        soften_backward(queries[r], at + other_row(c), s.scale, scores[r][c], dscores[r][c]);
    write_weights<kRows>(dscores, m.dweights);
    __syncwarp();  // a row's weights are written and read by one half warp
    add_product<kRows, kWidth>(m.dweights, m.others, dq);
  }
  float one[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) one[r] = 1;
  write_rows<kRows, kWidth>(dq, one, call.gradient(row, head), begin, end, s.dh);
}

// dk and dv. A block takes 16 kRows keys of one key/value head and goes through the heads that
// share it in order, and for each through the queries that see one of its keys in order. Bound by
// f32 multiplications, 8 dh for each visible pair.
template <int kRows, int kWidth, class Real>
__global__ void __launch_bounds__(kAttentionThreads, 1) backward_keys(BackwardCall<Real> call) {
  extern __shared__ float4 memory[];
  const BackwardMemory<kRows, kWidth> m(reinterpret_cast<float*>(memory));
  const AttentionShape& s = call.shape;
  const int64_t tile = blockIdx.x % call.tiles, pair = blockIdx.x / call.tiles;
  const int kv_head = int(pair % s.Hkv), group = s.H / s.Hkv;
  const int64_t row = pair / s.Hkv * s.L;
  const int64_t begin = tile * 16 * kRows, end = min(s.L, begin + 16 * kRows);
  load_tile<16 * kRows, kWidth>(call.input(row, s.H + kv_head), begin, end, s.dh, m.own);
  load_tile<16 * kRows, kWidth>(call.input(row, s.H + s.Hkv + kv_head), begin, end, s.dh,
                                m.own_other);
  RowSums<kRows, kWidth> dk, dv;
  clear(dk);
  clear(dv);
  for (int head = kv_head * group; head < (kv_head + 1) * group; ++head)
    for (int at = int(begin); at < s.L; at += kOthers) {
      if (s.firsts[row + at] >= end) break;  // firsts do not fall: nobody later sees these keys
      __syncthreads();  // the last tile's readers are done
      load_tile<kOthers, kWidth>(call.input(row, head), at, s.L, s.dh, m.others);
      load_tile<kOthers, kWidth>(call.upstream(row, head), at, s.L, s.dh, m.others_other);
      __syncthreads();
      QueryFacts queries[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) queries[c] = query_facts(call, row, at + other_row(c), head);
      float scores[kRows][2], dscores[kRows][2];
      multiply_rows<kRows, kWidth>(m.own, m.others, scores);
      multiply_rows<kRows, kWidth>(m.own_other, m.others_other, dscores);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int c = 0; c < 2; ++c)
          soften_backward(queries[c], int(begin) + own_row<kRows>(r), s.scale, scores[r][c],
                          dscores[r][c]);
      write_weights<kRows>(scores, m.weights);
      write_weights<kRows>(dscores, m.dweights);
      __syncwarp();  // a row's weights are written and read by one half warp
      add_product<kRows, kWidth>(m.weights, m.others_other, dv);
      add_product<kRows, kWidth>(m.dweights, m.others, dk);
    }
  float one[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) one[r] = 1;
  write_rows<kRows, kWidth>(dk, one, call.gradient(row, s.H + kv_head), begin, end, s.dh);
  write_rows<kRows, kWidth>(dv, one, call.gradient(row, s.H + s.Hkv + kv_head), begin, end, s.dh);
}

template <int kWidth, class Real>
void launch_backward(Stream& stream, const AttentionBackward& op, BackwardCall<Real> call) {
  constexpr int kRows = kWidth <= 128 ? 4 : 2;  // what fits into shared memory
  constexpr size_t kShared = kBackwardShared<kRows, kWidth>;
  call.tiles = ceil_divide(call.shape.L, 16 * kRows);
  launch_attention(stream, backward_queries<kRows, kWidth, Real>,
                   op.sequences * op.heads * call.tiles, kShared, call);
  launch_attention(stream, backward_keys<kRows, kWidth, Real>,
                   op.sequences * op.kv_heads * call.tiles, kShared, call);
}

}  // namespace

// Workspace: the first key that each token sees, then delta.
void run_cuda(Stream& stream, const AttentionBackward& op) {
  const int64_t T = op.qkv.rows();
  if (T == 0) return;
  const size_t head = size_t(ceil_divide(T * int64_t{sizeof(int32_t)}, 256) * 256);
  std::byte* space = stream.workspace(head + size_t(T * op.heads) * sizeof(float));
  auto* firsts = reinterpret_cast<int32_t*>(space);
  const AttentionShape shape = attention_shape(op, firsts);
  find_starts(stream, {.starts = op.starts, .B = op.sequences, .L = shape.L}, firsts);
  visit_real(op.qkv.dtype, [&]<class Real>() {
    const BackwardCall<Real> call{.shape = shape,
                                  .qkv = lines<Real>(op.qkv),
                                  .y = lines<Real>(op.y),
                                  .dy = lines<Real>(op.dy),
                                  .dqkv = lines<Real>(op.dqkv),
                                  .lse = lines<float>(op.lse),
                                  .delta = reinterpret_cast<float*>(space + head),
                                  .T = T,
                                  .tiles = 0};
    const int64_t warps = T * op.heads;
    find_delta<<<grid_of(ceil_divide(warps * 32, kAttentionThreads)), kAttentionThreads, 0,
                 native(stream)>>>(call);
    cuda_check(cudaGetLastError(), AttentionBackward::name);
    visit_width(shape.dh, [&]<int kWidth>() { launch_backward<kWidth>(stream, op, call); });
  });
}

}  // namespace moemamba
