// Scan and convolution on one GPU: one line a case, the median of 21 runs, beside what an H100 was
// measured to do: copies of 3.0 TB/s and 4.16 T exp2/s (one exp2 per state and step counts).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "core/arena.h"
#include "core/gpu.h"
#include "core/random.h"
#include "kernels/conv.h"
#include "kernels/scan.h"

namespace moemamba {
namespace {

constexpr double kBytesPerSecond = 3.0e12, kExpsPerSecond = 4.16e12;  // speed.md, section M
constexpr int kRuns = 21, kWarmUps = 3;

class Bench {
 public:
  explicit Bench(int64_t bytes) : arena_("bench", DeviceKind::cuda, bytes) {}
  Arena& arena() { return arena_; }

  Tensor empty(Shape shape, DType dtype = DType::f32) { return arena_.take(shape, dtype); }
  // Some rows, repeated: the time does not depend on the numbers.
  Tensor uniform(Shape shape, double low, double high, DType dtype = DType::f32) {
    const Tensor tensor = empty(shape, dtype);
    const int64_t rows = std::min<int64_t>(tensor.rows(), 256), cols = tensor.cols();
    const Random random(1, "bench");
    std::vector<float> wide;
    std::vector<bf16> narrow;
    for (int64_t i = 0; i < rows * cols; ++i) {
      wide.push_back(float(low + (high - low) * random.uniform(uint64_t(i))));
      narrow.push_back(bf16(wide.back()));
    }
    void* const data = dtype == DType::bf16 ? static_cast<void*>(narrow.data()) : wide.data();
    const Tensor host = view(data, {rows, cols}, dtype);
    for (int64_t row = 0; row < tensor.rows(); row += rows) {
      const int64_t count = std::min(rows, tensor.rows() - row);
      copy(stream_, host.row_range(0, count), tensor.row_range(row, row + count));
    }
    stream_.synchronize();
    return tensor;
  }

  template <class Op>
  void measure(const Op& op, const std::string& shape, DType dtype, double bytes, double exps) {
    print(Op::name, shape, dtype, median_of([&] { run(stream_, op); }), bytes, exps);
  }
  void print(const char* name, const std::string& shape, DType dtype, double median, double bytes,
             double exps) {
    std::printf("%-14s %-28s %-4s %9.1f us %5.1f %% of copy, %5.1f %% of exp2\n", name,
                shape.c_str(), name_of(dtype), median * 1e6,
                100 * bytes / kBytesPerSecond / median, 100 * exps / kExpsPerSecond / median);
    std::fflush(stdout);
  }
  template <class Fn>
  double median_of(Fn&& fn) {
    for (int i = 0; i < kWarmUps; ++i) fn();
    std::vector<double> times;
    for (int i = 0; i < kRuns; ++i) {
      const std::shared_ptr<void> begin = gpu::mark(stream_);
      fn();
      const std::shared_ptr<void> end = gpu::mark(stream_);
      times.push_back(gpu::seconds_between(begin, end));
    }
    std::nth_element(times.begin(), times.begin() + kRuns / 2, times.end());
    return times[kRuns / 2];
  }
  Stream& stream() { return stream_; }

 private:
  Stream stream_ = Stream::cuda();
  Arena arena_;
};

void bench_scan(Bench& bench, int64_t B, int64_t D, int64_t L, int64_t N, DType dtype) {
  Frame frame(bench.arena());
  const int64_t T = B * L;
  const auto tokens = [&](double low, double high) {
    return bench.uniform({T, D}, low, high, dtype);
  };
  const int64_t kept = scan_state_elements(B, L, D, N, DeviceKind::cuda);
  const ScanForward f{.u = tokens(-1, 1),
                      .dt = tokens(-1, 1),
                      .dt_bias = bench.uniform({D}, -6.9, -2.3),
                      .a_log = bench.uniform({D, N}, 0, 2.8),
                      .b = bench.uniform({T, N}, -1, 1, dtype),
                      .c = bench.uniform({T, N}, -1, 1, dtype),
                      .skip = bench.uniform({D}, -1, 1),
                      .z = tokens(-1, 1),
                      .initial = {},
                      .starts = {},
                      .y = bench.empty({T, D}, dtype),
                      .states = bench.empty({kept}),
                      .final = {},
                      .sequences = B};
  const ScanBackward b{.u = f.u,
                       .dt = f.dt,
                       .dt_bias = f.dt_bias,
                       .a_log = f.a_log,
                       .b = f.b,
                       .c = f.c,
                       .skip = f.skip,
                       .z = f.z,
                       .initial = {},
                       .starts = {},
                       .states = f.states,
                       .dy = tokens(-1, 1),
                       .dfinal = {},
                       .du = bench.empty({T, D}, dtype),
                       .ddt = bench.empty({T, D}, dtype),
                       .db = bench.empty({T, N}, dtype),
                       .dc = bench.empty({T, N}, dtype),
                       .dz = bench.empty({T, D}, dtype),
                       .da_log = bench.empty({D, N}),
                       .ddt_bias = bench.empty({D}),
                       .dskip = bench.empty({D}),
                       .dinitial = {},
                       .sequences = B};
  const double size = double(size_of(dtype)), elements = double(T * D);
  const double forward = elements * 4 * size + double(kept) * 4 + double(2 * T * N) * size;
  const double backward = elements * 7 * size + double(kept) * 4 + double(4 * T * N) * size;
  const std::string shape = concat(B, "x", D, "x", L, "x", N);
  ScanForward without = f;  // states: a pass without backward
  without.states = {};
  bench.measure(without, shape + ", no states", dtype, forward - double(kept) * 4,
                elements * double(N));
  bench.measure(f, shape, dtype, forward, elements * double(N));
  bench.measure(b, shape, dtype, backward, elements * double(N));
}

void bench_conv(Bench& bench, int64_t B, int64_t D, int64_t L, DType dtype) {
  Frame frame(bench.arena());
  const int64_t T = B * L, W = 4;
  const ConvForward f{.x = bench.uniform({T, D}, -1, 1, dtype),
                      .weight = bench.uniform({D, W}, -0.5, 0.5),
                      .bias = bench.uniform({D}, -0.5, 0.5),
                      .initial = {},
                      .starts = {},
                      .y = bench.empty({T, D}, dtype),
                      .final = {},
                      .sequences = B};
  const ConvBackward b{.x = f.x,
                       .weight = f.weight,
                       .bias = f.bias,
                       .initial = {},
                       .starts = {},
                       .dy = bench.uniform({T, D}, -1, 1, dtype),
                       .dfinal = {},
                       .dx = bench.empty({T, D}, dtype),
                       .dweight = bench.empty({D, W}),
                       .dbias = bench.empty({D}),
                       .dinitial = {},
                       .sequences = B};
  const double bytes = double(T * D * size_of(dtype)), exps = double(T * D);
  const std::string shape = concat(B, "x", D, "x", L);
  bench.measure(f, shape, dtype, 2 * bytes, exps);
  bench.measure(b, shape, dtype, 3 * bytes, exps);
}

int run_all() {
  std::string why;
  const std::vector<gpu::Facts> facts = gpu::devices(&why);
  if (facts.empty()) {
    std::printf("no GPU: %s\n", why.c_str());
    return 1;
  }
  std::printf("%s, %s; B x D x L x N; shares of 3.0 TB/s and 4.16 T exp2/s\n",
              facts[0].name.c_str(), gpu::build().c_str());
  Bench bench(int64_t{10} << 30);
  for (DType dtype : {DType::bf16, DType::f32}) {
    bench_scan(bench, 64, 1024, 1024, 16, dtype);
    bench_scan(bench, 8, 2048, 2048, 16, dtype);
    bench_scan(bench, 1, 2048, 65536, 16, dtype);
    bench_scan(bench, 1, 1024, 8192, 16, dtype);
    bench_scan(bench, 64, 1024, 1, 16, dtype);
    bench_conv(bench, 64, 1024, 1024, dtype);
  }
  return 0;
}

}  // namespace
}  // namespace moemamba

int main() {
  try {
    return moemamba::run_all();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
