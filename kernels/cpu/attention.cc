#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/cpu/attention_tiles.h"
#include "kernels/cpu/row_blocks.h"

namespace moemamba {

namespace {

// y and lse of one tile of queries: keys tile by tile, each time moving the sums to the greatest
// score so far.
void forward_tile(const AttentionForward& op, const AttentionCall& call, const Queries& queries,
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
void append(Stream& stream, const AttentionForward& op, AttentionCall& call) {
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

}  // namespace

const AttentionKernels& attention_kernels(SimdLevel level) {
  return level == SimdLevel::avx512 ? avx512::attention_kernels : avx2::attention_kernels;
}

void AttentionForward::check() const {
  const AttentionSizes s = check_attention(*this);
  if (lse) expect("lse[T, H]", lse, {s.T, heads});
  if (!cache) {
    moemamba::check(filled == 0 && !first, "filled and first belong to a cache; give one");
    return;
  }
  const auto [sequences, slots, columns] = dims<3>("cache[B, slots, 2 Hkv dh]", cache);
  expect("cache[B, slots, 2 Hkv dh]", cache, {s.B, slots, 2 * kv_heads * s.dh}, qkv.dtype);
  moemamba::check(filled >= 0 && filled + s.L <= slots, "cache: its ", slots, " slots cannot take ",
                  s.L, " tokens behind the ", filled, " that fill it; make it longer");
  moemamba::check(!starts || first,
                  "document starts with a cache need `first`, which later calls "
                  "read");
  if (first) expect("first[B]", first, {s.B}, DType::i32);
}

void run_cpu(Stream& stream, const AttentionForward& op) {
  const int64_t T = op.qkv.rows();
  if (T == 0) return;
  const int64_t L = T / op.sequences, tiles = (L + kQueries - 1) / kQueries;
  const int64_t tasks = op.sequences * op.heads * tiles;
  const AttentionWorkspace space(stream, T, tasks, kTile);
  AttentionCall call = attention_call(op, space.firsts);
  call.filled = op.filled;
  int32_t* first = static_cast<int32_t*>(op.first.data);
  find_firsts(op.starts, first, call, space.firsts);
  if (op.cache) append(stream, op, call);
  space.for_tasks(stream, tasks, [&](int64_t task, float* tile) {
    const int64_t begin = task % tiles * kQueries, head = task / tiles % op.heads;
    forward_tile(op, call, {task / tiles / op.heads, head, begin, std::min(L, begin + kQueries)},
                 tile);
  });
  for (int64_t sequence = 0; first && sequence < op.sequences; ++sequence)
    first[sequence] = int32_t(space.firsts[sequence * L + L - 1]);
}

}  // namespace moemamba
