// Products at the sizes of a training step (d 512, inner width 1024, vocabulary 50304, 65536
// tokens, 32 experts of 1536), in bf16 on one GPU: median of 20, TFLOP/s, and the share of what an
// H100's largest bf16 product reaches. Grouped products: as they are run (wgmma on Hopper), beside
// mma.sync; MISMATCH where the two differ by more than rounding.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <deque>
#include <exception>
#include <memory>
#include <vector>

#include "core/arena.h"
#include "core/gpu.h"
#include "core/random.h"
#include "kernels/cuda/cross_entropy.h"
#include "kernels/cuda/products.h"
#include "kernels/matmul.h"

namespace moemamba {
namespace {

constexpr int kRuns = 20, kWarmUps = 3;
constexpr double kCeiling = 745e12;  // speed.md, section M: 8192^3 on an H100
constexpr int64_t T = 65536, D = 512, V = 50304;

class Bench {
 public:
  Tensor take(Shape shape, DType dtype = DType::bf16) {
    buffers_.emplace_back(DeviceKind::cuda, shape.elements() * size_of(dtype));
    return view(buffers_.back(), 0, shape, dtype);
  }
  // A period of them, again and again.
  Tensor normal(Shape shape, double scale = 1) {
    const int64_t count = shape.elements();
    int64_t done = std::min<int64_t>(count, 65537);
    const Random random(1, "bench");
    std::vector<bf16> numbers;
    for (int64_t i = 0; i < done; ++i)
      numbers.push_back(bf16(float(scale * random.normal(uint64_t(i)))));
    const Tensor tensor = take(shape), flat = tensor.reshaped({1, count});
    copy(stream_, view(numbers.data(), {1, done}), flat.column_range(0, done));
    stream_.synchronize();
    for (int64_t more = 0; done < count; done += more) {
      more = std::min(done, count - done);
      copy(stream_, flat.column_range(0, more), flat.column_range(done, done + more));
    }
    return tensor;
  }
  Tensor integers(const std::vector<int32_t>& values) {
    std::vector<int32_t> list = values;
    const Tensor tensor = take({int64_t(list.size())}, DType::i32);
    copy(stream_, view(list.data(), {int64_t(list.size())}), tensor);
    stream_.synchronize();
    return tensor;
  }
  void forget() { buffers_.clear(); }

  template <class Op>
  void time(const char* what, double flops, const Op& op) {
    time_work(what, flops, [&] { run(stream_, op); }, "");
  }

  template <class Op>
  void time_grouped(const std::string& what, double flops, const Op& op) {
    const double error = difference(op);
    char note[64];
    std::snprintf(note, sizeof note, "  %.1e%s", error, error < 1e-2 ? "" : " MISMATCH");
    time_work((what + ", wgmma").c_str(), flops, [&] { run(stream_, op); }, note);
    time_work((what + ", mma.sync").c_str(), flops, [&] { multiply_by_mma(stream_, op); }, "");
  }

  // As it is run beside chunks of f32 logits; how far apart losses and gradients are.
  void time_head(const std::string& what, double flops, const HeadCrossEntropy& op) {
    HeadCrossEntropy other = op;
    other.loss = take(op.loss.shape, DType::f32);
    if (op.dx) other.dx = take(op.dx.shape), other.dweight = take(op.dweight.shape, DType::f32);
    run(stream_, op);
    run_head_by_blas(stream_, other);
    std::string note = concat("  loss ", difference(op.loss, other.loss));
    if (op.dx)
      note += concat(", dx ", difference(op.dx, other.dx), ", dW ",
                     difference(op.dweight, other.dweight));
    time_work((what + ", as run").c_str(), flops, [&] { run(stream_, op); }, note.c_str());
    time_work((what + ", f32 logits").c_str(), flops, [&] { run_head_by_blas(stream_, other); },
              "");
  }

 private:
  // ||found - expected|| / ||expected||; infinite where one is not finite.
  double difference(const Tensor& a, const Tensor& b) {
    const std::vector<float> found = numbers(a), expected = numbers(b);
    double apart = 0, whole = 0;
    for (size_t i = 0; i < found.size(); ++i) {
      apart += double(found[i] - expected[i]) * double(found[i] - expected[i]);
      whole += double(expected[i]) * double(expected[i]);
    }
    return std::isfinite(apart) && whole > 0 ? std::sqrt(apart / whole) : INFINITY;
  }
  // run() beside mma.sync, from zeros.
  template <class Op>
  double difference(const Op& op) {
    Op other = op;
    other.out = take(op.out.shape, op.out.dtype);
    for (const Tensor& out : {op.out, other.out}) fill_zero(stream_, out);
    run(stream_, op);
    multiply_by_mma(stream_, other);
    return difference(op.out, other.out);
  }
  std::vector<float> numbers(const Tensor& tensor) {
    std::vector<float> list(size_t(tensor.elements()));
    if (tensor.dtype == DType::f32) {
      copy(stream_, tensor, view(list.data(), tensor.shape));
      stream_.synchronize();
      return list;
    }
    std::vector<bf16> narrow(list.size());
    copy(stream_, tensor, view(narrow.data(), tensor.shape));
    stream_.synchronize();
    for (size_t i = 0; i < list.size(); ++i) list[i] = float(narrow[i]);
    return list;
  }

  template <class Work>
  void time_work(const char* what, double flops, const Work& work, const char* note) {
    for (int i = 0; i < kWarmUps; ++i) work();
    std::vector<double> times;
    for (int i = 0; i < kRuns; ++i) {
      const std::shared_ptr<void> begin = gpu::mark(stream_);
      work();
      const std::shared_ptr<void> end = gpu::mark(stream_);
      times.push_back(gpu::seconds_between(begin, end));
    }
    std::nth_element(times.begin(), times.begin() + kRuns / 2, times.end());
    const double seconds = times[kRuns / 2], rate = flops / seconds;
    std::printf("%-52s %9.1f us %7.1f TFLOP/s %5.1f %%%s\n", what, seconds * 1e6, rate * 1e-12,
                100 * rate / kCeiling, note);
    std::fflush(stdout);
  }

  Stream stream_ = Stream::cuda();
  std::deque<Buffer> buffers_;
};

// y = x W', dx = dy W, dW += dy' x.
void time_linear(Bench& bench, const char* name, int64_t rows, int64_t in, int64_t out) {
  const Tensor x = bench.normal({rows, in}), w = bench.normal({out, in});
  const Tensor dy = bench.normal({rows, out});
  const Tensor y = bench.take({rows, out}), dx = bench.take({rows, in});
  const Tensor dw = bench.take({out, in}, DType::f32);
  const double flops = 2.0 * double(rows) * double(in) * double(out);
  const auto label = [&](const char* what) { return std::string(name) + what; };
  bench.time(label(", y").c_str(), flops, Matmul{.a = x, .b = w, .out = y, .b_transposed = true});
  bench.time(label(", dx").c_str(), flops, Matmul{.a = dy, .b = w, .out = dx});
  bench.time(label(", dW").c_str(), flops,
             Matmul{.a = dy, .b = x, .out = dw, .a_transposed = true, .accumulate = true});
  bench.forget();
}

// Rows of a group: as many in each, or (with `skew`) from 1/E to nearly twice the mean.
std::vector<int32_t> offsets_of(int64_t E, int64_t R, bool skew) {
  std::vector<int32_t> offsets = {0};
  for (int64_t e = 0; e < E; ++e)
    offsets.push_back(skew ? int32_t(R * (e + 1) * (e + 1) / (E * E)) : int32_t(R * (e + 1) / E));
  return offsets;
}

struct Experts {
  const char* name;
  int64_t E, R, N, K;
  bool skew;
};

void time_experts(Bench& bench, const Experts& s) {
  const Tensor x = bench.normal({s.R, s.K}), dy = bench.normal({s.R, s.N});
  const Tensor w = bench.normal({s.E, s.N, s.K});
  const Tensor offsets = bench.integers(offsets_of(s.E, s.R, s.skew));
  const Tensor y = bench.take({s.R, s.N}), dx = bench.take({s.R, s.K});
  const Tensor dw = bench.take({s.E, s.N, s.K}, DType::f32);
  const double flops = 2.0 * double(s.R) * double(s.N) * double(s.K);
  const auto label = [&](const char* what) { return std::string(s.name) + what; };
  bench.time_grouped(
      label(", y"), flops,
      GroupedMatmul{.a = x, .b = w, .offsets = offsets, .out = y, .b_transposed = true});
  bench.time_grouped(label(", dx"), flops,
                     GroupedMatmul{.a = dy, .b = w, .offsets = offsets, .out = dx});
  bench.time_grouped(label(", dW"), flops,
                     GroupedOuter{.a = dy, .b = x, .offsets = offsets, .out = dw});
  bench.time_grouped(
      label(", dW +="), flops,
      GroupedOuter{.a = dy, .b = x, .offsets = offsets, .out = dw, .accumulate = true});
  bench.forget();
}

void time_head(Bench& bench) {
  std::vector<int32_t> targets;
  for (int64_t t = 0; t < T; ++t) targets.push_back(int32_t(t * 7919 % V));
  HeadCrossEntropy op{.x = bench.normal({T, D}),
                      .weight = bench.normal({V, D}, 0.04),
                      .targets = bench.integers(targets),
                      .loss = bench.take({T}, DType::f32),
                      .scale = 1.f / T};
  const double flops = 2.0 * T * V * D;
  bench.time_head("head and loss, 65536 x 50304 x 512", flops, op);
  op.dx = bench.take({T, D});
  op.dweight = bench.take({V, D}, DType::f32);
  bench.time_head("head and loss, with gradients", 3 * flops, op);
  bench.forget();
}

int run_all() {
  std::string why;
  const std::vector<gpu::Facts> facts = gpu::devices(&why);
  if (facts.empty()) {
    std::printf("no GPU: %s\n", why.c_str());
    return 1;
  }
  std::printf("%s, %s; share of %.0f TFLOP/s\n", facts[0].name.c_str(), gpu::build().c_str(),
              kCeiling * 1e-12);
  Bench bench;
  time_linear(bench, "in, 65536: 512 -> 2048", T, 512, 2048);
  time_linear(bench, "out, 65536: 1024 -> 512", T, 1024, 512);
  time_linear(bench, "x, 65536: 1024 -> 64", T, 1024, 64);
  time_linear(bench, "head, 8192: 512 -> 50304", 8192, D, V);
  time_experts(bench, {"32 experts, 65536: 512 -> 1536", 32, T, 1536, D, false});
  time_experts(bench, {"32 experts, 65536: 1536 -> 512", 32, T, D, 1536, false});
  time_experts(bench, {"32 uneven experts, 65536: 512 -> 1536", 32, T, 1536, D, true});
  time_experts(bench, {"8 experts, 4096 each: 2048 -> 768", 8, 32768, 768, 2048, false});
  time_head(bench);
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
