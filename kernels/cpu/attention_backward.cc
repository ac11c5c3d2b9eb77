#include "kernels/cpu/attention_tiles.h"

namespace moemamba {

namespace {

struct BackwardTile {
  const Queries& queries;
  int64_t begin, end;  // keys
  float *scores, *dscores;
};

// Adds what one tile gives to dk and dv; writes (the first tile of the queries) or adds to dq.
void add_products(const AttentionBackward& op, const AttentionCall& call,
                  const BackwardTile& tile) {
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
void backward_queries(const AttentionBackward& op, const AttentionCall& call,
                      const Queries& queries, float* scratch) {
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
void backward_group(const AttentionBackward& op, const AttentionCall& call, int64_t task,
                    float* scratch) {
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

}  // namespace

void AttentionBackward::check() const {
  const AttentionSizes s = check_attention(*this);
  expect("lse[T, H]", lse, {s.T, heads});
  expect("dy[T, H dh]", dy, {s.T, heads * s.dh}, qkv.dtype);
  expect("dqkv[T, (H + 2 Hkv) dh]", dqkv, qkv.shape, qkv.dtype);
}

void run_cpu(Stream& stream, const AttentionBackward& op) {
  const int64_t tasks = op.sequences * op.kv_heads;
  if (op.qkv.rows() == 0) return;
  const AttentionWorkspace space(stream, op.qkv.rows(), tasks, 2 * kTile);
  const AttentionCall call = attention_call(op, space.firsts);
  find_firsts(op.starts, nullptr, call, space.firsts);
  space.for_tasks(stream, tasks,
                  [&](int64_t task, float* scratch) { backward_group(op, call, task, scratch); });
}

}  // namespace moemamba
