#include <cblas.h>
#include <time.h>

#include <algorithm>
#include <cstdio>

#include "kernels/cpu/blas_core.h"
#include "kernels/cpu/simd/level.h"
#include "tests/bench/bench.h"

namespace moemamba {

double compute_seconds() {
  timespec now;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

Ceiling::Ceiling() : a_(2048 * 2048, 0.5f), b_(a_.size(), 0.25f), out_(a_.size()) {
  openblas_set_num_threads(1);
  seconds();
  std::vector<double> all;
  for (int i = 0; i < 7; ++i) all.push_back(seconds());
  std::nth_element(all.begin(), all.begin() + 3, all.end());
  rate_ = kFlops / all[3];
}

double Ceiling::seconds() {
  constexpr int n = 2048;
  const double start = compute_seconds();
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, n, n, n, 1, a_.data(), n, b_.data(), n, 0,
              out_.data(), n);
  return compute_seconds() - start;
}

}  // namespace moemamba

// First the ceiling, then the benchmarks that are asked for, each beside it.
int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  moemamba::Ceiling ceiling;
  std::printf("%s, vectors %s; ceiling: SGEMM 2048^3 on one core %.1f GFLOP/s\n",
              moemamba::blas_core().c_str(), moemamba::name_of(moemamba::simd_level()),
              ceiling.rate() * 1e-9);
  moemamba::add_matmul_benchmarks(ceiling);
  moemamba::add_scan_benchmarks(ceiling);
  moemamba::add_attention_benchmarks(ceiling);
  moemamba::add_step_benchmarks(ceiling);
  moemamba::add_checkpoint_benchmarks();
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
