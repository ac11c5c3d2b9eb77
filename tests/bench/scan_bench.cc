#include <benchmark/benchmark.h>

#include "kernels/cpu/conv.h"
#include "kernels/cpu/scan.h"
#include "tests/support/cases.h"

// One core. Items are (b, l, d) elements. The ceiling of the scan is that of the multiply units:
// 8 operations on 16 lanes a state and step forward, 16 backward, and the memory's for the rest.
namespace moemamba {
namespace {

constexpr int64_t B = 4, L = 512, D = 512, T = B * L, W = 4;

// Rows without padding, on 64-byte borders, as an arena hands them out.
Tensor rows(Case& c, double scale = 1) {
  return c.normal({T * D}, scale).reshaped({T, D});
}

struct ScanCase {
  Case c{1};
  ScanForward forward;
  ScanBackward backward;

  explicit ScanCase(int64_t N) {
    forward = {.u = rows(c),
               .dt = rows(c, 0.5),
               .dt_bias = c.uniform({D}, -6.9, -2.3),
               .a_log = c.uniform({D, N}, 0, 2.8),
               .b = c.normal({T, N}),
               .c = c.normal({T, N}),
               .skip = c.normal({D}),
               .z = rows(c),
               .y = rows(c),
               .states = c.empty({scan_state_elements(B, L, D, N)}),
               .sequences = B};
    const ScanForward& f = forward;
    backward = {.u = f.u,
                .dt = f.dt,
                .dt_bias = f.dt_bias,
                .a_log = f.a_log,
                .b = f.b,
                .c = f.c,
                .skip = f.skip,
                .z = f.z,
                .states = f.states,
                .dy = rows(c),
                .du = rows(c),
                .ddt = rows(c),
                .db = c.empty({T, N}),
                .dc = c.empty({T, N}),
                .dz = rows(c),
                .da_log = c.empty({D, N}),
                .ddt_bias = c.empty({D}),
                .dskip = c.empty({D}),
                .sequences = B};
  }
};

template <class Op>
void run_elements(benchmark::State& state, const Op& op) {
  Stream stream = Stream::immediate();
  for (auto _ : state) run_cpu(stream, op, SimdLevel(state.range(0)));
  state.SetItemsProcessed(state.iterations() * T * D);
}

void ScanForwardElements(benchmark::State& state) {
  const ScanCase test(state.range(1));
  run_elements(state, test.forward);
}

void ScanBackwardElements(benchmark::State& state) {
  const ScanCase test(state.range(1));
  Stream stream = Stream::immediate();
  run(stream, test.forward);
  run_elements(state, test.backward);
}

void ConvForwardElements(benchmark::State& state) {
  Case c(2);
  run_elements(state, ConvForward{.x = rows(c),
                                  .weight = c.normal({D, W}),
                                  .bias = c.normal({D}),
                                  .y = rows(c),
                                  .sequences = B});
}

void ConvBackwardElements(benchmark::State& state) {
  Case c(3);
  run_elements(state, ConvBackward{.x = rows(c),
                                   .weight = c.normal({D, W}),
                                   .bias = c.normal({D}),
                                   .dy = rows(c),
                                   .dx = rows(c),
                                   .dweight = c.empty({D, W}),
                                   .dbias = c.empty({D}),
                                   .sequences = B});
}

void for_levels(benchmark::internal::Benchmark* bench) {
  bench->ArgName("avx512")->DenseRange(0, int64_t(simd_level()));
}
void for_levels_and_states(benchmark::internal::Benchmark* bench) {
  bench->ArgNames({"avx512", "N"});
  for (int64_t level = 0; level <= int64_t(simd_level()); ++level)
    for (int64_t N : {16, 64}) bench->Args({level, N});
}
BENCHMARK(ScanForwardElements)->Apply(for_levels_and_states);
BENCHMARK(ScanBackwardElements)->Apply(for_levels_and_states);
BENCHMARK(ConvForwardElements)->Apply(for_levels);
BENCHMARK(ConvBackwardElements)->Apply(for_levels);

}  // namespace
}  // namespace moemamba
