#include <benchmark/benchmark.h>

#include "kernels/cpu/scan.h"
#include "tests/support/cases.h"

namespace moemamba {
namespace {

constexpr int64_t B = 4, L = 512, D = 512, T = B * L;

struct ScanCase {
  Case c{1};
  ScanForward forward;
  ScanBackward backward;

  explicit ScanCase(int64_t N) {
    forward = {.u = c.normal({T, D}),
               .dt = c.normal({T, D}, 0.5),
               .dt_bias = c.uniform({D}, -6.9, -2.3),
               .a_log = c.uniform({D, N}, 0, 2.8),
               .b = c.normal({T, N}),
               .c = c.normal({T, N}),
               .skip = c.normal({D}),
               .z = c.normal({T, D}),
               .y = c.empty({T, D}),
               .states = c.empty({scan_state_elements(B, L, D, N)}),
               .sequences = B};
    backward = {.u = forward.u,
                .dt = forward.dt,
                .dt_bias = forward.dt_bias,
                .a_log = forward.a_log,
                .b = forward.b,
                .c = forward.c,
                .skip = forward.skip,
                .z = forward.z,
                .states = forward.states,
                .dy = c.normal({T, D}),
                .du = c.empty({T, D}),
                .ddt = c.empty({T, D}),
                .db = c.empty({T, N}),
                .dc = c.empty({T, N}),
                .dz = c.empty({T, D}),
                .da_log = c.empty({D, N}),
                .ddt_bias = c.empty({D}),
                .dskip = c.empty({D}),
                .sequences = B};
  }
};

// Arguments: the instruction set, N. Items are (b, l, d) elements: the ceiling at N = 16 is that
// of the multiply units, 9 operations of 16 lanes a state forward and 17 backward.
void scan_forward(benchmark::State& state) {
  ScanCase test(state.range(1));
  Stream stream = Stream::immediate();
  for (auto _ : state) run_cpu(stream, test.forward, SimdLevel(state.range(0)));
  state.SetItemsProcessed(state.iterations() * T * D);
}

void scan_backward(benchmark::State& state) {
  ScanCase test(state.range(1));
  Stream stream = Stream::immediate();
  run_cpu(stream, test.forward, SimdLevel(state.range(0)));
  for (auto _ : state) run_cpu(stream, test.backward, SimdLevel(state.range(0)));
  state.SetItemsProcessed(state.iterations() * T * D);
}

void levels(benchmark::internal::Benchmark* bench) {
  bench->ArgNames({"avx512", "N"});
  for (int64_t level = 0; level <= int64_t(simd_level()); ++level)
    for (int64_t N : {16, 64}) bench->Args({level, N});
}
BENCHMARK(scan_forward)->Apply(levels);
BENCHMARK(scan_backward)->Apply(levels);

}  // namespace
}  // namespace moemamba
