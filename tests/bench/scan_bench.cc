#include "kernels/cpu/conv.h"
#include "kernels/cpu/scan.h"
#include "tests/bench/bench.h"
#include "tests/support/cases.h"

// One core. Items are (b, l, d) elements. The ceiling of the scan is that of the multiply units,
// which SGEMM keeps busy: a state and step takes 8 of their operations forward, 16 backward.
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

// The multiply units' operations count 2 FLOPs each, as in SGEMM.
template <class Op>
void run_beside_sgemm(benchmark::State& state, const Op& op, double multiplies, Ceiling& ceiling) {
  Stream stream = Stream::immediate();
  run_beside(ceiling, state, 2 * multiplies * double(T * D * state.range(1)),
             [&] { run_cpu(stream, op, SimdLevel(state.range(0))); });
  state.SetItemsProcessed(state.iterations() * T * D);
}

void scan_forward(benchmark::State& state, Ceiling& ceiling) {
  const ScanCase test(state.range(1));
  run_beside_sgemm(state, test.forward, 8, ceiling);
}

void scan_backward(benchmark::State& state, Ceiling& ceiling) {
  const ScanCase test(state.range(1));
  Stream stream = Stream::immediate();
  run(stream, test.forward);
  run_beside_sgemm(state, test.backward, 16, ceiling);
}

void conv_forward(benchmark::State& state) {
  Case c(2);
  run_elements(state, ConvForward{.x = rows(c),
                                  .weight = c.normal({D, W}),
                                  .bias = c.normal({D}),
                                  .y = rows(c),
                                  .sequences = B});
}

void conv_backward(benchmark::State& state) {
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

// `run` for each set of vector instructions that this machine has.
template <class Run>
void add(const char* name, Run run, std::vector<int64_t> states = {}) {
  auto* bench = benchmark::RegisterBenchmark(name, run)->Unit(benchmark::kMillisecond);
  bench->ArgNames(states.empty() ? std::vector<std::string>{"avx512"}
                                 : std::vector<std::string>{"avx512", "N"});
  for (int64_t level = 0; level <= int64_t(simd_level()); ++level) {
    if (states.empty()) bench->Arg(level);
    for (int64_t N : states) bench->Args({level, N});
  }
}

}  // namespace

void add_scan_benchmarks(Ceiling& ceiling) {
  add("ScanForward", [&](benchmark::State& state) { scan_forward(state, ceiling); }, {16, 64});
  add("ScanBackward", [&](benchmark::State& state) { scan_backward(state, ceiling); }, {16, 64});
  add("ConvForward", conv_forward);
  add("ConvBackward", conv_backward);
}

}  // namespace moemamba
