#include "kernels/attention.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/operands.h"
#include "kernels/cpu/row_blocks.h"
#include "kernels/cpu/simd/attention.h"

namespace moemamba {

namespace {

// Queries and keys of a tile: its products q . k lie in the second-level cache (128 KiB, in
// backward twice), and are still large enough for BLAS.
constexpr int64_t kQueries = 128, kKeys = 256, kTile = kQueries * kKeys;

// What forward and backward share; rows of q, k and v are a token's, heads lie dh columns apart.
// Keys count from the sequence's first, or from the cache's slot 0.
struct Call {
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
Call call_of(const Op& op, const int64_t* firsts) {
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
void find_firsts(const Tensor& starts, const int32_t* first, const Call& call, int64_t* firsts) {
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
struct Workspace {
  int64_t* firsts;
  float* scratch;
  int64_t floats, workers;

  Workspace(Stream& stream, int64_t T, int64_t tasks, int64_t floats)
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
  int64_t row(const Call& call) const { return sequence * call.L + begin; }
};

// The row of query `i` beside keys begin .. end, which lie in a tile's row of scores.
ScoreRow score_row(const Call& call, const Queries& queries, int64_t i, int64_t begin, int64_t end,
                   float* tile) {
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
void multiply_heads(const Call& call, const float* a, int64_t a_stride, int64_t rows,
                    const float* b, int64_t b_stride, int64_t keys, float* tile) {
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

// y and lse of one tile of queries: keys tile by tile, each time moving the sums to the greatest
// score so far.
void forward_tile(const AttentionForward& op, const Call& call, const Queries& queries,
                  float* tile) {
  const AttentionKernels& kernels = attention_kernels(simd_level());
  const int64_t kv_head = queries.head / (call.H / call.Hkv), row = queries.row(call);
  const int64_t first = call.firsts[row], all = call.filled + queries.end;
  const auto y = [&](int64_t i) { return op.y.row<float>(row + i) + queries.head * call.dh; };
  float greatest[kQueries], sum[kQueries];
  std::fill_n(greatest, kQueries, -std::numeric_limits<float>::infinity());
  std::fill_n(sum, kQueries, 0.f);
  for (int64_t begin = first; begin < all; begin += kKeys) {
    const int64_t end = std::min(all, begin + kKeys);
    multiply_heads(call, call.query(queries.sequence, queries.head, queries.begin), call.q.stride,
                   queries.count(), call.key(queries.sequence, kv_head, begin), call.k.stride,
                   end - begin, tile);
    for (int64_t i = 0; i < queries.count(); ++i)
      kernels.soften(score_row(call, queries, i, begin, end, tile), greatest + i, sum + i, y(i),
                     call.dh);
    multiply({.a = tile,
              .a_stride = kKeys,
              .b = call.value(queries.sequence, kv_head, begin),
              .b_stride = call.v.stride,
              .c = y(0),
              .c_stride = op.y.stride,
              .M = queries.count(),
              .N = call.dh,
              .K = end - begin,
              .accumulate = begin > first});
  }
  for (int64_t i = 0; i < queries.count(); ++i) {
    kernels.scale(y(i), 1 / sum[i], call.dh);
    if (op.lse)
      op.lse.row<float>(row + i)[queries.head] =
          float(double(greatest[i]) + std::log(double(sum[i])));
  }
}

// Puts the keys and values of this call into their slots and reads them from there.
void append(Stream& stream, const AttentionForward& op, Call& call) {
  const int64_t slots = op.cache.shape[1], columns = call.Hkv * call.dh;
  const Source k = call.k;
  for_row_blocks(stream, call.B * call.L, rows_per_block(2 * columns),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t t = begin; t < end; ++t) {
                     const int64_t slot = t / call.L * slots + op.filled + t % call.L;
                     std::memcpy(op.cache.row<float>(slot), k.data + t * k.stride,
                                 size_t(2 * columns) * sizeof(float));
                   }
                 });
  call.k = source(op.cache);
  call.v = {call.k.data + columns, call.k.stride};
  call.sequence_keys = slots;
}

struct BackwardTile {
  const Queries& queries;
  int64_t begin, end;  // keys
  float *scores, *dscores;
};

// Adds what one tile gives to dk and dv; writes (the first tile of the queries) or adds to dq.
void add_products(const AttentionBackward& op, const Call& call, const BackwardTile& tile) {
  const Queries& queries = tile.queries;
  const int64_t kv_head = queries.head / (call.H / call.Hkv), row = queries.row(call);
  const int64_t key_row = queries.sequence * call.L + tile.begin, keys = tile.end - tile.begin;
  Gemm to_keys{.a = tile.scores,
               .a_stride = kKeys,
               .b = op.dy.row<float>(row) + queries.head * call.dh,
               .b_stride = op.dy.stride,
               .c = op.dqkv.row<float>(key_row) + (call.H + call.Hkv + kv_head) * call.dh,
               .c_stride = op.dqkv.stride,
               .M = keys,
               .N = call.dh,
               .K = queries.count(),
               .a_transposed = true,
               .accumulate = true};
  multiply(to_keys);
  to_keys.a = tile.dscores;
  to_keys.b = call.query(queries.sequence, queries.head, queries.begin);
  to_keys.b_stride = call.q.stride;
  to_keys.c = op.dqkv.row<float>(key_row) + (call.H + kv_head) * call.dh;
  multiply(to_keys);
  multiply({.a = tile.dscores,
            .a_stride = kKeys,
            .b = call.key(queries.sequence, kv_head, tile.begin),
            .b_stride = call.k.stride,
            .c = op.dqkv.row<float>(row) + queries.head * call.dh,
            .c_stride = op.dqkv.stride,
            .M = queries.count(),
            .N = call.dh,
            .K = keys,
            .accumulate = tile.begin > call.firsts[row]});
}

// All key tiles of some queries, in the keys' order.
void backward_queries(const AttentionBackward& op, const Call& call, const Queries& queries,
                      float* scratch) {
  const AttentionKernels& kernels = attention_kernels(simd_level());
  const int64_t kv_head = queries.head / (call.H / call.Hkv), row = queries.row(call);
  const int64_t column = queries.head * call.dh;
  float* dscores = scratch + kTile;
  float delta[kQueries];
  for (int64_t i = 0; i < queries.count(); ++i)
    delta[i] =
        kernels.dot(op.y.row<float>(row + i) + column, op.dy.row<float>(row + i) + column, call.dh);
  for (int64_t begin = call.firsts[row]; begin < queries.end; begin += kKeys) {
    const int64_t end = std::min(queries.end, begin + kKeys), keys = end - begin;
    multiply_heads(call, call.query(queries.sequence, queries.head, queries.begin), call.q.stride,
                   queries.count(), call.key(queries.sequence, kv_head, begin), call.k.stride, keys,
                   scratch);
    multiply_heads(call, op.dy.row<float>(row) + column, op.dy.stride, queries.count(),
                   call.value(queries.sequence, kv_head, begin), call.v.stride, keys, dscores);
    for (int64_t i = 0; i < queries.count(); ++i)
      kernels.backward(score_row(call, queries, i, begin, end, scratch), dscores + i * kKeys,
                       op.lse.row<float>(row + i)[queries.head], delta[i]);
    add_products(op, call, {queries, begin, end, scratch, dscores});
  }
}

// One sequence and key/value head: the sums of its dk and dv run over its heads, then its queries.
void backward_group(const AttentionBackward& op, const Call& call, int64_t task, float* scratch) {
  const int64_t sequence = task / call.Hkv, kv_head = task % call.Hkv, group = call.H / call.Hkv;
  for (int64_t place = 0; place < call.L; ++place)
    for (int64_t part : {call.H, call.H + call.Hkv})
      std::fill_n(op.dqkv.row<float>(sequence * call.L + place) + (part + kv_head) * call.dh,
                  call.dh, 0.f);
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
    for (int64_t begin = 0; begin < call.L; begin += kQueries)
      backward_queries(op, call, {sequence, head, begin, std::min(call.L, begin + kQueries)},
                       scratch);
}

// What both directions take; returns {B, T, L, dh}.
struct Sizes {
  int64_t B, T, L, dh;
};
template <class Op>
Sizes check_inputs(const Op& op) {
  const auto [T, columns] = dims<2>("qkv[T, (H + 2 Hkv) dh]", op.qkv);
  const int64_t B = op.sequences, H = op.heads, Hkv = op.kv_heads;
  check(B >= 1 ? T % B == 0 : B == 0 && T == 0, "sequences must divide the T = ", T,
        " tokens, found ", B);
  check(Hkv >= 1 && H >= 1 && H % Hkv == 0, "kv_heads must divide heads = ", H, ", found ", Hkv);
  check(columns > 0 && columns % (H + 2 * Hkv) == 0, "qkv[T, (H + 2 Hkv) dh]: with ", H,
        " heads and ", Hkv, " key/value heads the columns must be a multiple of ", H + 2 * Hkv,
        ", found ", columns);
  const int64_t dh = columns / (H + 2 * Hkv);
  expect("qkv[T, (H + 2 Hkv) dh]", op.qkv, {T, columns});
  expect("y[T, H dh]", op.y, {T, H * dh});
  if (op.starts) expect("starts[T]", op.starts, {T}, DType::u8);
  return {B, T, B ? T / B : 0, dh};
}

}  // namespace

const AttentionKernels& attention_kernels(SimdLevel level) {
  return level == SimdLevel::avx512 ? avx512::attention_kernels : avx2::attention_kernels;
}

void AttentionForward::check() const {
  const Sizes s = check_inputs(*this);
  if (lse) expect("lse[T, H]", lse, {s.T, heads});
  if (!cache) {
    moemamba::check(filled == 0 && !first, "filled and first belong to a cache; give one");
    return;
  }
  const auto [sequences, slots, columns] = dims<3>("cache[B, slots, 2 Hkv dh]", cache);
  expect("cache[B, slots, 2 Hkv dh]", cache, {s.B, slots, 2 * kv_heads * s.dh});
  moemamba::check(filled >= 0 && filled + s.L <= slots, "cache: its ", slots, " slots cannot take ",
                  s.L, " tokens behind the ", filled, " that fill it; make it longer");
  moemamba::check(!starts || first,
                  "document starts with a cache need `first`, which later calls "
                  "read");
  if (first) expect("first[B]", first, {s.B}, DType::i32);
}

void AttentionBackward::check() const {
  const Sizes s = check_inputs(*this);
  expect("lse[T, H]", lse, {s.T, heads});
  expect("dy[T, H dh]", dy, {s.T, heads * s.dh});
  expect("dqkv[T, (H + 2 Hkv) dh]", dqkv, qkv.shape);
}

void run_cpu(Stream& stream, const AttentionForward& op) {
  const int64_t T = op.qkv.rows();
  if (T == 0) return;
  const int64_t L = T / op.sequences, tiles = (L + kQueries - 1) / kQueries;
  const int64_t tasks = op.sequences * op.heads * tiles;
  const Workspace space(stream, T, tasks, kTile);
  Call call = call_of(op, space.firsts);
  call.filled = op.filled;
  if (op.cache) append(stream, op, call);
  int32_t* first = static_cast<int32_t*>(op.first.data);
  find_firsts(op.starts, first, call, space.firsts);
  space.for_tasks(stream, tasks, [&](int64_t task, float* tile) {
    const int64_t begin = task % tiles * kQueries, head = task / tiles % op.heads;
    forward_tile(op, call, {task / tiles / op.heads, head, begin, std::min(L, begin + kQueries)},
                 tile);
  });
  for (int64_t sequence = 0; first && sequence < op.sequences; ++sequence)
    first[sequence] = int32_t(space.firsts[sequence * L + L - 1]);
}

void run_cpu(Stream& stream, const AttentionBackward& op) {
  const int64_t tasks = op.sequences * op.kv_heads;
  if (op.qkv.rows() == 0) return;
  const Workspace space(stream, op.qkv.rows(), tasks, 2 * kTile);
  const Call call = call_of(op, space.firsts);
  find_firsts(op.starts, nullptr, call, space.firsts);
  space.for_tasks(stream, tasks,
                  [&](int64_t task, float* scratch) { backward_group(op, call, task, scratch); });
}

}  // namespace moemamba
