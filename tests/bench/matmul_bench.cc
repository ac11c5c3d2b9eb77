#include "kernels/cross_entropy.h"
#include "kernels/matmul.h"
#include "kernels/routing.h"
#include "tests/bench/bench.h"
#include "tests/support/cases.h"

// One core, beside SGEMM.
namespace moemamba {
namespace {

// The three products of a linear layer y[T, F] = x[T, D] W': y, dx and dW.
enum Product { kForward, kInput, kWeight };

void run_linear(benchmark::State& state, Ceiling& ceiling) {
  const int64_t T = state.range(0), D = state.range(1), F = state.range(2);
  Case c(1);
  Stream stream = Stream::immediate();
  const Tensor x = c.normal({T, D}), w = c.normal({F, D}), y = c.normal({T, F});
  const Matmul op =
      state.range(3) == kForward ? Matmul{.a = x, .b = w, .out = y, .b_transposed = true}
      : state.range(3) == kInput ? Matmul{.a = y, .b = w, .out = x}
                                 : Matmul{.a = y, .b = x, .out = w, .a_transposed = true};
  run_beside(ceiling, state, 2.0 * double(T * D * F), [&] { run(stream, op); });
}
void run_experts(benchmark::State& state, Ceiling& ceiling) {
  constexpr int64_t E = 8;
  const int64_t R = state.range(0), D = state.range(1), F = state.range(2);
  Case c(2);
  Stream stream = Stream::immediate();
  const Tensor x = c.normal({R, D}), w = c.normal({E, F, D}), y = c.normal({R, F});
  std::vector<double> ends;  // shares as uneven as after a balance loss
  for (int64_t e = 0; e <= E; ++e) ends.push_back(double(R * e * (e + 24) / (E * (E + 24))));
  const Tensor offsets = c.values({E + 1}, ends, DType::i32);
  const auto product = state.range(3);
  run_beside(ceiling, state, 2.0 * double(R * D * F), [&] {
    if (product == kForward)
      run(stream,
          GroupedMatmul{.a = x, .b = w, .offsets = offsets, .out = y, .b_transposed = true});
    else if (product == kInput)
      run(stream, GroupedMatmul{.a = y, .b = w, .offsets = offsets, .out = x});
    else
      run(stream, GroupedOuter{.a = y, .b = x, .offsets = offsets, .out = w});
  });
}
void run_head(benchmark::State& state, Ceiling& ceiling) {
  const int64_t T = state.range(0), D = state.range(1), V = state.range(2);
  Case c(3);
  Stream stream = Stream::immediate();
  const HeadCrossEntropy op{.x = c.normal({T, D}, 0.1),
                            .weight = c.normal({V, D}),
                            .targets = c.integers({T}, 0, V - 1),
                            .loss = c.empty({T}),
                            .dx = c.empty({T, D}),
                            .dweight = c.empty({V, D})};
  run_beside(ceiling, state, 6.0 * double(T * D * V), [&] { run(stream, op); });
}
// Route, permute, un-permute and their gradients: everything of a MoE layer that is no product.
void run_routing(benchmark::State& state) {
  const int64_t T = state.range(0), E = state.range(1), K = state.range(2), D = 192;
  Case c(4);
  Stream stream = Stream::immediate();
  const auto i32 = [&](Shape shape) { return c.empty(shape, DType::i32); };
  const Route route{.logits = c.normal({T, E}),
                    .probabilities = c.empty({T, E}),
                    .expert = i32({T, K}),
                    .weight = c.empty({T, K}),
                    .position = i32({T, K}),
                    .source = i32({T * K}),
                    .offsets = i32({E + 1}),
                    .counts = i32({1, E}),
                    .balance = c.empty({1}),
                    .z = c.empty({1}),
                    .flag = i32({1})};
  const Tensor x = c.normal({T, D}), y = c.empty({T, D}), dweight = c.empty({T, K});
  const Tensor rows = c.empty({T * K, D}), drows = c.empty({T * K, D}), dlogits = c.empty({T, E});
  for (auto _ : state) {
    run(stream, route);
    run(stream,
        Permute{
            .x = x, .source = route.source, .offsets = route.offsets, .rows = rows, .top_k = K});
    run(stream,
        Unpermute{.rows = rows, .position = route.position, .weight = route.weight, .y = y});
    run(stream, UnpermuteBackward{.dy = y,
                                  .rows = rows,
                                  .position = route.position,
                                  .weight = route.weight,
                                  .drows = drows,
                                  .dweight = dweight});
    run(stream, PermuteBackward{.drows = drows, .position = route.position, .dx = y});
    run(stream, RouteBackward{.logits = route.logits,
                              .probabilities = route.probabilities,
                              .expert = route.expert,
                              .position = route.position,
                              .counts = route.counts,
                              .dweight = dweight,
                              .dlogits = dlogits,
                              .balance_scale = 0.01f});
  }
  state.counters["tokens/s"] =
      benchmark::Counter(double(T * state.iterations()), benchmark::Counter::kIsRate);
}

}  // namespace

void add_matmul_benchmarks(Ceiling& ceiling) {
  const auto add = [&](const char* name, auto bench) {
    return benchmark::RegisterBenchmark(
        name, [&ceiling, bench](benchmark::State& state) { bench(state, ceiling); });
  };
  add("Linear", run_linear)
      ->ArgNames({"T", "D", "F", "product"})
      ->ArgsProduct({{2048, 8192}, {192, 256}, {512, 1024, 4096}, {kForward, kInput, kWeight}})
      ->Unit(benchmark::kMillisecond);
  add("Experts", run_experts)
      ->ArgNames({"R", "D", "F", "product"})
      ->ArgsProduct({{2048, 4096, 8192}, {192, 256}, {512, 1024}, {kForward, kInput, kWeight}})
      ->Unit(benchmark::kMillisecond);
  add("Head", run_head)
      ->ArgNames({"T", "D", "V"})
      ->ArgsProduct({{2048, 8192}, {192, 256}, {4096}})
      ->Unit(benchmark::kMillisecond);
  benchmark::RegisterBenchmark("Routing", run_routing)
      ->ArgNames({"T", "E", "K"})
      ->Args({4096, 8, 1})
      ->Args({4096, 8, 2})
      ->Args({4096, 42, 1})
      ->Unit(benchmark::kMillisecond);
}

}  // namespace moemamba
