#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>

#include "kernels/attention.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/operands.h"
#include "kernels/cpu/simd/attention.h"

namespace moemamba {  // what attention's two directions share

// What both directions take; returns {B, T, L, dh}.
struct AttentionSizes {
  int64_t B, T, L, dh;
};
template <class Op>
AttentionSizes check_attention(const Op& op) {
  const auto [T, columns] = dims<2>("qkv[T, (H + 2 Hkv) dh]", op.qkv);
  const int64_t B = op.sequences, H = op.heads, Hkv = op.kv_heads;
  check(B >= 1 ? T % B == 0 : B == 0 && T == 0, "sequences must divide the T = ", T,
        " tokens, found ", B);
  check(Hkv >= 1 && H >= 1 && H % Hkv == 0, "kv_heads must divide heads = ", H, ", found ", Hkv);
  check(columns > 0 && columns % (H + 2 * Hkv) == 0, "qkv[T, (H + 2 Hkv) dh]: with ", H,
        " heads and ", Hkv, " key/value heads the columns must be a multiple of ", H + 2 * Hkv,
        ", found ", columns);
  const int64_t dh = columns / (H + 2 * Hkv);
  expect_real("qkv[T, (H + 2 Hkv) dh]", op.qkv);
  expect("y[T, H dh]", op.y, {T, H * dh}, op.qkv.dtype);
  if (op.starts) expect("starts[T]", op.starts, {T}, DType::u8);
  return {B, T, B ? T / B : 0, dh};
}

// Queries and keys of a tile: its products q . k (64 KiB, in backward twice) stay in the
// second-level cache, little is spent above the diagonal, and BLAS still has enough to do.
inline constexpr int64_t kQueries = 64, kKeys = 256, kTile = kQueries * kKeys;

// What forward and backward share; rows of q, k and v are a token's, heads lie dh columns apart.
// Keys count from the sequence's first, or from the cache's slot 0.
struct AttentionCall {
  int64_t B, L, H, Hkv, dh, filled;
  Source q, k, v;
  int64_t sequence_keys;  // rows of k from one sequence to the next
  const int64_t* firsts;  // [T]: the first key that a token sees
  float scale;

  const float* query(int64_t sequence, int64_t head, int64_t place) const {
    return q.data + (sequence * L + place) * q.stride + head * dh;
  }
  const float* key(int64_t sequence, int64_t kv_head, int64_t at) const {
    return k.data + (sequence * sequence_keys + at) * k.stride + kv_head * dh;
  }
  const float* value(int64_t sequence, int64_t kv_head, int64_t at) const {
    return v.data + (sequence * sequence_keys + at) * v.stride + kv_head * dh;
  }
};

template <class Op>
AttentionCall attention_call(const Op& op, const int64_t* firsts) {
  const int64_t H = op.heads, Hkv = op.kv_heads, dh = op.qkv.cols() / (H + 2 * Hkv);
  const int64_t L = op.sequences ? op.qkv.rows() / op.sequences : 0;
  const float* qkv = floats(op.qkv);
  const int64_t stride = op.qkv.stride;
  return {.B = op.sequences,
          .L = L,
          .H = H,
          .Hkv = Hkv,
          .dh = dh,
          .filled = 0,
          .q = {qkv, stride},
          .k = {qkv + H * dh, stride},
          .v = {qkv + (H + Hkv) * dh, stride},
          .sequence_keys = L,
          .firsts = firsts,
          .scale = float(1 / std::sqrt(double(dh)))};
}

// The visible keys' beginning for every token; `first` (or null) holds that of earlier calls.
inline void find_firsts(const Tensor& starts, const int32_t* first, const AttentionCall& call,
                        int64_t* firsts) {
  const uint8_t* start = static_cast<const uint8_t*>(starts.data);
  for (int64_t sequence = 0; sequence < call.B; ++sequence) {
    int64_t seen = first ? first[sequence] : 0;
    check(0 <= seen && seen <= call.filled, "first[", sequence, "] must be one of the ",
          call.filled, " filled slots or the next, found ", seen);
    for (int64_t place = 0; place < call.L; ++place) {
      const int64_t t = sequence * call.L + place;
      if (start && start[t]) seen = call.filled + place;
      firsts[t] = seen;
    }
  }
}

// The stream's workspace: firsts [T], then scratch for each thread that works.
struct AttentionWorkspace {
  int64_t* firsts;
  float* scratch;
  int64_t floats, workers;

  AttentionWorkspace(Stream& stream, int64_t T, int64_t tasks, int64_t floats)
      : floats(floats), workers(std::min<int64_t>(stream.threads(), tasks)) {
    const size_t head = (size_t(T) * sizeof(int64_t) + 63) / 64 * 64;
    std::byte* space = stream.workspace(head + size_t(workers * floats) * sizeof(float));
    firsts = reinterpret_cast<int64_t*>(space);
    scratch = reinterpret_cast<float*>(space + head);
  }

  // Calls body(task, scratch) for 0 <= task < tasks; who takes which does not matter.
  template <class Body>
  void for_tasks(Stream& stream, int64_t tasks, Body body) const {
    std::atomic<int64_t> next{0};
    stream.parallel_for(workers, [&](int64_t worker) {
      for (int64_t task; (task = next.fetch_add(1)) < tasks;) body(task, scratch + worker * floats);
    });
  }
};

// Some queries of one head: places begin .. end of a sequence.
struct Queries {
  int64_t sequence, head, begin, end;
  int64_t count() const { return end - begin; }
  int64_t row(const AttentionCall& call) const { return sequence * call.L + begin; }
};

// The row of query `i` beside keys begin .. end, which lie in a tile's row of scores.
inline ScoreRow score_row(const AttentionCall& call, const Queries& queries, int64_t i,
                          int64_t begin, int64_t end, float* tile) {
  const int64_t first = call.firsts[queries.row(call) + i];
  const int64_t last = call.filled + queries.begin + i;
  const int64_t from = std::clamp(first, begin, end);
  return {.scores = tile + i * kKeys,
          .keys = end - begin,
          .begin = from - begin,
          .end = std::clamp(last + 1, from, end) - begin,
          .scale = call.scale};
}

// tile[queries, keys] = rows of a . rows of b
inline void multiply_heads(const AttentionCall& call, const float* a, int64_t a_stride,
                           int64_t rows, const float* b, int64_t b_stride, int64_t keys,
                           float* tile) {
  multiply({.a = a,
            .a_stride = a_stride,
            .b = b,
            .b_stride = b_stride,
            .c = tile,
            .c_stride = kKeys,
            .M = rows,
            .N = keys,
            .K = call.dh,
            .b_transposed = true});
}

}  // namespace moemamba
