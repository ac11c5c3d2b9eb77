#pragma once
#include <benchmark/benchmark.h>

#include <vector>

namespace moemamba {

// Seconds that this process has computed: the same as a clock's on a quiet machine, but without
// the time that other programs take.
double compute_seconds();

// Seconds of one product 2048 x 2048 x 2048 by the machine's BLAS on one core.
class Ceiling {
 public:
  static constexpr double kFlops = 2.0 * 2048 * 2048 * 2048;
  Ceiling();
  double seconds();  // of one more product
  // FLOP/s of the median of several, measured when this was made: what all shares refer to.
  double rate() const { return rate_; }

 private:
  std::vector<float> a_, b_, out_;
  double rate_ = 0;
};

// Runs `work` as often as the benchmark wants. Counters GFLOP/s and, as a share of the ceiling,
// `of_sgemm`, for `flops` in each iteration.
template <class Work>
void run_beside(const Ceiling& ceiling, benchmark::State& state, double flops, const Work& work) {
  const double start = compute_seconds();
  for (auto _ : state) work();
  const double rate = flops * double(state.iterations()) / (compute_seconds() - start);
  state.counters["GFLOP/s"] = rate * 1e-9;
  state.counters["of_sgemm"] = rate / ceiling.rate();
}

// Each registers its file's benchmarks; `ceiling` outlives them.
void add_matmul_benchmarks(Ceiling& ceiling);
void add_scan_benchmarks(Ceiling& ceiling);
void add_attention_benchmarks(Ceiling& ceiling);
void add_step_benchmarks(Ceiling& ceiling);
void add_checkpoint_benchmarks();  // beside a ceiling of their own

}  // namespace moemamba
