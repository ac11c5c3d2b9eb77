#include "kernels/attention.h"

#include "kernels/bias.h"
#include "kernels/rope.h"
#include "tests/bench/bench.h"
#include "tests/support/cases.h"

// One core. FLOPs are those of the visible pairs of tokens, B H L (L + 1) / 2 of them: 4 dh each
// forward (two products), 10 dh backward (five). Their ceiling is SGEMM's rate.
namespace moemamba {
namespace {

struct AttentionCase {
  Case c{1};
  int64_t B, L, H, Hkv, dh, T;
  AttentionForward forward;
  AttentionBackward backward;

  explicit AttentionCase(const benchmark::State& state)
      : B(state.range(0)),
        L(state.range(1)),
        H(state.range(2)),
        Hkv(state.range(3)),
        dh(state.range(4)),
        T(B * L) {
    const int64_t columns = (H + 2 * Hkv) * dh;
    forward = {.qkv = c.normal({T, columns}),
               .y = c.empty({T, H * dh}),
               .lse = c.empty({T, H}),
               .sequences = B,
               .heads = H,
               .kv_heads = Hkv};
    backward = {.qkv = forward.qkv,
                .y = forward.y,
                .lse = forward.lse,
                .dy = c.normal({T, H * dh}),
                .dqkv = c.empty({T, columns}),
                .sequences = B,
                .heads = H,
                .kv_heads = Hkv};
  }
  double pairs() const { return double(B * H) * double(L) * double(L + 1) / 2; }
};

void attention_forward(benchmark::State& state, const Ceiling& ceiling) {
  const AttentionCase test(state);
  Stream stream = Stream::immediate();
  run_beside(ceiling, state, 4 * test.pairs() * double(test.dh),
             [&] { run(stream, test.forward); });
}

void attention_backward(benchmark::State& state, const Ceiling& ceiling) {
  const AttentionCase test(state);
  Stream stream = Stream::immediate();
  run(stream, test.forward);
  run_beside(ceiling, state, 10 * test.pairs() * double(test.dh),
             [&] { run(stream, test.backward); });
}

// One token of each sequence beside L earlier ones: reads 8 L Hkv dh bytes of the cache.
void attention_decode(benchmark::State& state) {
  AttentionCase test(state);
  AttentionForward op = test.forward;
  op.qkv = op.qkv.row_range(0, test.B);
  op.y = op.y.row_range(0, test.B);
  op.lse = {};
  op.cache = test.c.normal({test.B, test.L + 1, 2 * test.Hkv * test.dh});
  op.filled = test.L;
  Stream stream = Stream::immediate();
  for (auto _ : state) run(stream, op);
  state.SetBytesProcessed(state.iterations() * 8 * test.T * test.Hkv * test.dh);
}

constexpr int64_t kTokens = 2048, kColumns = 1024, kHead = 64;

void rope(benchmark::State& state) {
  Case c(2);
  Stream stream = Stream::immediate();
  const Tensor x = c.normal({kTokens, kColumns});
  const Rope op{.x = x, .y = x, .sequences = 2, .head_width = kHead};
  for (auto _ : state) run(stream, op);
  state.SetBytesProcessed(state.iterations() * 8 * kTokens * kColumns);
}

void add_bias(benchmark::State& state) {
  Case c(3);
  Stream stream = Stream::immediate();
  const Tensor x = c.normal({kTokens, kColumns});
  const AddBias op{.x = x, .bias = c.zeros({kColumns}), .y = x};
  for (auto _ : state) run(stream, op);
  state.SetBytesProcessed(state.iterations() * 8 * kTokens * kColumns);
}

void bias_backward(benchmark::State& state) {
  Case c(4);
  Stream stream = Stream::immediate();
  const BiasBackward op{.dy = c.normal({kTokens, kColumns}), .dbias = c.empty({kColumns})};
  for (auto _ : state) run(stream, op);
  state.SetBytesProcessed(state.iterations() * 4 * kTokens * kColumns);
}

// The paper's 25M shape, Mixtral's ratio of heads, short and long sequences.
template <class Run>
void add_shapes(const char* name, Run run) {
  benchmark::RegisterBenchmark(name, run)
      ->ArgNames({"B", "L", "H", "Hkv", "dh"})
      ->Args({2, 1024, 8, 8, 64})
      ->Args({8, 256, 8, 8, 64})
      ->Args({1, 1024, 8, 2, 128})
      ->Args({1, 4096, 4, 4, 64})
      ->Unit(benchmark::kMillisecond);
}

}  // namespace

void add_attention_benchmarks(Ceiling& ceiling) {
  add_shapes("AttentionForward",
             [&](benchmark::State& state) { attention_forward(state, ceiling); });
  add_shapes("AttentionBackward",
             [&](benchmark::State& state) { attention_backward(state, ceiling); });
  add_shapes("AttentionDecode", attention_decode);
  benchmark::RegisterBenchmark("Rope", rope)->Unit(benchmark::kMillisecond);
  benchmark::RegisterBenchmark("AddBias", add_bias)->Unit(benchmark::kMillisecond);
  benchmark::RegisterBenchmark("BiasBackward", bias_backward)->Unit(benchmark::kMillisecond);
}

}  // namespace moemamba
