#include "kernels/cuda/attention_tiles.cuh"

namespace moemamba {

namespace {

template <class Real>
struct ForwardCall {
  AttentionShape shape;
  Lines<Real> qkv, keys, y;  // keys: k heads | v heads of a key
  float* lse;                // [T, H], rows lse_stride apart; or null
  int64_t lse_stride, tiles;
};

// What a row of queries knows of its softmax so far, in powers of two.
template <int kRows>
struct Softmax {
  float greatest[kRows], total[kRows];
};

// The greatest, and the sum, over the 16 lanes of a row.
__device__ __forceinline__ float lanes_max(float x) {
#pragma unroll
  for (int step = 8; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}
__device__ __forceinline__ float lanes_sum(float x) {
#pragma unroll
  for (int step = 8; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// Turns a tile's scores into exp(score - greatest so far), 0 where they are not visible, and moves
// what was summed before to the new greatest. The tile's keys begin at `at`; row r sees first[r] ..
// last[r].
template <int kRows, int kWidth>
__device__ __forceinline__ void soften(float (&scores)[kRows][2], int at, const int (&first)[kRows],
                                       const int (&last)[kRows], float scale,
                                       Softmax<kRows>& softmax, RowSums<kRows, kWidth>& sums) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float most = softmax.greatest[r];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int key = at + other_row(c);
      const bool visible = first[r] <= key && key <= last[r];
      scores[r][c] = visible ? scores[r][c] * scale : -INFINITY;
      most = fmaxf(most, scores[r][c]);
    }
    most = lanes_max(most);
    const float base = most == -INFINITY ? 0.f : most;  // nothing was visible so far
    const float factor = exp2f(softmax.greatest[r] - base);
#pragma unroll
    for (int c = 0; c < 2; ++c) scores[r][c] = exp2f(scores[r][c] - base);
    softmax.total[r] = softmax.total[r] * factor + lanes_sum(scores[r][0] + scores[r][1]);
    softmax.greatest[r] = most;
#pragma unroll
    for (int p = 0; p < sums.kParts; ++p)
#pragma unroll
      for (int i = 0; i < sums.kPart; ++i) sums.at[r][p][i] *= factor;
  }
}

// Shared memory: queries [16 kRows], keys and values [kOthers] of kWidth columns, weights.
template <int kRows, int kWidth>
constexpr size_t kForwardShared =
    sizeof(float) *
    ((16 * kRows + 2 * kOthers) * kTileStride<kWidth> + 16 * kRows * kWeightStride);

// A block takes 16 kRows queries of one head and goes through their visible keys in order, tile by
// tile. Reads q once and k, v once for every tile of queries, writes y and lse once; bound by f32
// multiplications (4 dh for each visible pair) and by reads of shared memory.
template <int kRows, int kWidth, class Real>
__global__ void __launch_bounds__(kAttentionThreads, 1) forward(ForwardCall<Real> call) {
  extern __shared__ float4 memory[];
  float* queries = reinterpret_cast<float*>(memory);
  float* keys = queries + 16 * kRows * kTileStride<kWidth>;
  float* values = keys + kOthers * kTileStride<kWidth>;
  float* weights = values + kOthers * kTileStride<kWidth>;
  const AttentionShape& s = call.shape;
  const int64_t tile = blockIdx.x % call.tiles, pair = blockIdx.x / call.tiles;
  const int head = int(pair % s.H), kv_head = head / (s.H / s.Hkv);
  const int64_t sequence = pair / s.H, row = sequence * s.L;
  const int64_t begin = tile * 16 * kRows, end = min(s.L, begin + 16 * kRows);
  load_tile<16 * kRows, kWidth>(Head<Real>{call.qkv.row(row) + head * s.dh, call.qkv.stride}, begin,
                                end, s.dh, queries);
  int first[kRows], last[kRows];
  Softmax<kRows> softmax;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t place = begin + own_row<kRows>(r);
    first[r] = place < end ? s.firsts[row + place] : 0;
    last[r] = place < end ? int(s.filled + place) : -1;
    softmax.greatest[r] = -INFINITY;
    softmax.total[r] = 0;
  }
  RowSums<kRows, kWidth> sums;
  clear(sums);
  const Real* key_rows = call.keys.row(sequence * s.sequence_keys) + kv_head * s.dh;
  const Head<const Real> k{key_rows, call.keys.stride};
  const Head<const Real> v{key_rows + s.Hkv * s.dh, call.keys.stride};
  const int all = int(s.filled + end);
  for (int at = s.firsts[row + begin]; at < all; at += kOthers) {
    __syncthreads();  // the last tile's readers are done
    load_tile<kOthers, kWidth>(k, at, all, s.dh, keys);
    load_tile<kOthers, kWidth>(v, at, all, s.dh, values);
    __syncthreads();
    float scores[kRows][2];
    multiply_rows<kRows, kWidth>(queries, keys, scores);
    soften<kRows, kWidth>(scores, at, first, last, s.scale * kLog2e, softmax, sums);
    write_weights<kRows>(scores, weights);
    __syncwarp();  // a row's weights are written and read by one half warp
    add_product<kRows, kWidth>(weights, values, sums);
  }
  float factor[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t place = begin + own_row<kRows>(r);
    factor[r] = 1.f / softmax.total[r];
    if (call.lse && place < end && threadIdx.x % 16 == 0)
      call.lse[(row + place) * call.lse_stride + head] =
          softmax.greatest[r] * kLn2 + logf(softmax.total[r]);
  }
  write_rows<kRows, kWidth>(sums, factor, Head<Real>{call.y.row(row) + head * s.dh, call.y.stride},
                            begin, end, s.dh);
}

template <class Real>
struct Appended {
  Lines<Real> from, to;  // from: k heads | v heads of the call's tokens
  int64_t T, columns, L, slots, filled;
};

// One element per thread: keys and values of the call's tokens, into their slots.
template <class Real>
__global__ void __launch_bounds__(kAttentionThreads) append(Appended<Real> o) {
  const Place place =
      place_of(int64_t(blockIdx.x) * kAttentionThreads + threadIdx.x, o.columns);
  if (place.row >= o.T) return;
  const Place token = place_of(place.row, o.L);
  o.to.row(token.row * o.slots + o.filled + token.column)[place.column] =
      o.from.row(place.row)[place.column];
}

template <class Real>
void append_keys(Stream& stream, const AttentionForward& op, const AttentionShape& shape) {
  const int64_t T = op.qkv.rows(), columns = 2 * int64_t{shape.Hkv} * shape.dh;
  const Appended<Real> o{.from = {pointer<Real>(op.qkv) + shape.H * shape.dh, op.qkv.stride},
                         .to = lines<Real>(op.cache),
                         .T = T,
                         .columns = columns,
                         .L = shape.L,
                         .slots = op.cache.shape[1],
                         .filled = op.filled};
  append<<<grid_of(ceil_divide(T * columns, kAttentionThreads)), kAttentionThreads, 0,
           native(stream)>>>(o);
  cuda_check(cudaGetLastError(), AttentionForward::name);
}

template <int kRows, class Real>
void launch_forward(Stream& stream, const AttentionForward& op, ForwardCall<Real> call) {
  call.tiles = ceil_divide(call.shape.L, 16 * kRows);
  const int64_t blocks = op.sequences * op.heads * call.tiles;
  visit_width(call.shape.dh, [&]<int kWidth>() {
    launch_attention(stream, forward<kRows, kWidth, Real>, blocks, kForwardShared<kRows, kWidth>,
                     call);
  });
}

}  // namespace

// Workspace: the first key that each token sees.
void run_cuda(Stream& stream, const AttentionForward& op) {
  const int64_t T = op.qkv.rows();
  if (T == 0) return;
  auto* firsts = reinterpret_cast<int32_t*>(stream.workspace(size_t(T) * sizeof(int32_t)));
  AttentionShape shape = attention_shape(op, firsts);
  shape.filled = op.filled;
  if (op.cache) shape.sequence_keys = op.cache.shape[1];
  check(shape.filled + shape.L < int64_t{1} << 31, AttentionForward::name,
        ": a sequence has fewer than 2^31 tokens, found ", shape.filled + shape.L);
  find_starts(stream,
              {.starts = op.starts,
               .first = pointer<int32_t>(op.first),
               .offset = op.filled,
               .B = op.sequences,
               .L = shape.L},
              firsts);
  visit_real(op.qkv.dtype, [&]<class Real>() {
    if (op.cache) append_keys<Real>(stream, op, shape);
    ForwardCall<Real> call{.shape = shape,
                           .qkv = lines<Real>(op.qkv),
                           .keys = {pointer<Real>(op.qkv) + shape.H * shape.dh, op.qkv.stride},
                           .y = lines<Real>(op.y),
                           .lse = pointer<float>(op.lse),
                           .lse_stride = op.lse.stride};
    if (op.cache) call.keys = lines<Real>(op.cache);
    if (shape.L <= 16) launch_forward<1, Real>(stream, op, call);  // decoding
    else launch_forward<4, Real>(stream, op, call);
  });
}

}  // namespace moemamba
