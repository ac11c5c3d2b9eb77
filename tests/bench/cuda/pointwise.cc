// Operators that memory binds, at the sizes of a training step (65536 tokens, d 512, hidden width
// 1536, vocabulary 50304) on one GPU: median of 20, GB/s of what has to be moved (operators.md),
// and the share of what a copy on an H100 moves.
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
#include "kernels/adamw.h"
#include "kernels/embedding.h"
#include "kernels/norm.h"
#include "kernels/pointwise.h"

namespace moemamba {
namespace {

constexpr int kRuns = 20, kWarmUps = 3;
constexpr double kCeiling = 3.0e12;  // speed.md, section M: device copy, read and write
constexpr int64_t T = 65536, D = 512, F = 1536, V = 50304, P = 100'000'000;

class Bench {
 public:
  // Zeros.
  Tensor take(Shape shape, DType dtype = DType::bf16) {
    buffers_.emplace_back(DeviceKind::cuda, shape.elements() * size_of(dtype));
    const Tensor tensor = view(buffers_.back(), 0, shape, dtype);
    fill_zero(stream_, tensor);
    return tensor;
  }
  Tensor numbers(std::vector<float> values) {
    const Tensor tensor = take({int64_t(values.size())}, DType::f32);
    copy(stream_, view(values.data(), tensor.shape), tensor);
    stream_.synchronize();
    return tensor;
  }
  Tensor integers(std::vector<int32_t> values) {
    const Tensor tensor = take({int64_t(values.size())}, DType::i32);
    copy(stream_, view(values.data(), tensor.shape), tensor);
    stream_.synchronize();
    return tensor;
  }
  void forget() { buffers_.clear(); }

  template <class Op>
  void time(const char* what, double bytes, const Op& op) {
    for (int i = 0; i < kWarmUps; ++i) run(stream_, op);
    std::vector<double> times;
    for (int i = 0; i < kRuns; ++i) {
      const std::shared_ptr<void> begin = gpu::mark(stream_);
      run(stream_, op);
      const std::shared_ptr<void> end = gpu::mark(stream_);
      times.push_back(gpu::seconds_between(begin, end));
    }
    std::nth_element(times.begin(), times.begin() + kRuns / 2, times.end());
    const double seconds = times[kRuns / 2], rate = bytes / seconds;
    std::printf("%-44s %9.1f us %7.0f GB/s %5.1f %%\n", what, seconds * 1e6, rate * 1e-9,
                100 * rate / kCeiling);
    std::fflush(stdout);
  }

 private:
  Stream stream_ = Stream::cuda();
  std::deque<Buffer> buffers_;
};

void time_norms(Bench& bench) {
  const double row = 2.0 * T * D;  // bytes of one tensor
  for (NormKind kind : {NormKind::layer, NormKind::rms}) {
    const bool layer = kind == NormKind::layer;
    const auto vector = [&](int64_t count) { return bench.take({count}, DType::f32); };
    const auto rows = [&]() { return bench.take({T, D}); };
    NormForward forward{.x = rows(),
                        .residual = rows(),
                        .weight = vector(D),
                        .sum = rows(),
                        .y = rows(),
                        .rstd = vector(T),
                        .kind = kind};
    if (layer) forward.bias = vector(D), forward.mean = vector(T);
    bench.time(layer ? "layer norm with residual" : "RMS norm with residual", 4 * row, forward);
    NormBackward backward{.dy = forward.y,
                          .x = forward.sum,
                          .weight = forward.weight,
                          .mean = forward.mean,
                          .rstd = forward.rstd,
                          .dsum = forward.residual,
                          .dx = rows(),
                          .dweight = vector(D),
                          .kind = kind};
    if (layer) backward.dbias = vector(D);
    bench.time(layer ? "layer norm, backward" : "RMS norm, backward", 4 * row, backward);
    bench.forget();
  }
}

void time_swiglu(Bench& bench) {
  const Tensor gate = bench.take({T, F}), up = bench.take({T, F}), y = bench.take({T, F});
  const Tensor dgate = bench.take({T, F}), dup = bench.take({T, F});
  const double row = 2.0 * T * F;
  bench.time("SwiGLU", 3 * row, SwiGluForward{.gate = gate, .up = up, .y = y});
  bench.time("SwiGLU, backward", 5 * row,
             SwiGluBackward{.gate = gate, .up = up, .dy = y, .dgate = dgate, .dup = dup});
  bench.forget();
}

void time_optimizer(Bench& bench) {
  const auto flat = [&]() { return bench.take({P}, DType::f32); };
  const Tensor gradient = flat(), value = flat(), sum = bench.take({1}, DType::f64);
  bench.time("AdamW, 100 M elements", 28.0 * P,
             AdamW{.gradient = gradient,
                   .verdict = bench.numbers({1, 1}),
                   .value = value,
                   .m = flat(),
                   .v = flat()});
  bench.time("sum of squares, 100 M elements", 4.0 * P,
             SumOfSquares{.x = gradient, .sum = sum});
  bench.time("cast, 100 M elements", 6.0 * P, Cast{.from = value, .to = bench.take({P})});
  bench.forget();
}

// Ids of uniform frequency, and of one that falls as 1 / rank does, as that of words in text.
void time_embedding(Bench& bench) {
  const Random random(1, "bench");
  std::vector<int32_t> uniform, text;
  for (int64_t t = 0; t < T; ++t) {
    const double u = random.uniform(uint64_t(t));
    uniform.push_back(int32_t(u * V));
    text.push_back(std::min(int32_t(V - 1), int32_t(std::exp(u * std::log(double(V)))) - 1));
  }
  const Tensor table = bench.take({V, D}), dtable = bench.take({V, D}, DType::f32);
  const Tensor y = bench.take({T, D});
  bench.time("embedding", 4.0 * T * D,
             EmbeddingForward{.ids = bench.integers(uniform), .table = table, .y = y});
  const double bytes = 2.0 * T * D + 4.0 * V * D;
  bench.time("embedding, backward, uniform ids", bytes,
             EmbeddingBackward{.ids = bench.integers(uniform), .dy = y, .dtable = dtable});
  bench.time("embedding, backward, ids of text", bytes,
             EmbeddingBackward{.ids = bench.integers(text), .dy = y, .dtable = dtable});
  bench.time("embedding, backward, one id", bytes,
             EmbeddingBackward{.ids = bench.integers(std::vector<int32_t>(size_t(T), 17)),
                               .dy = y,
                               .dtable = dtable});
  bench.forget();
}

int run_all() {
  std::string why;
  const std::vector<gpu::Facts> facts = gpu::devices(&why);
  if (facts.empty()) {
    std::printf("no GPU: %s\n", why.c_str());
    return 1;
  }
  std::printf("%s, %s; share of %.1f TB/s\n", facts[0].name.c_str(), gpu::build().c_str(),
              kCeiling * 1e-12);
  Bench bench;
  time_norms(bench);
  time_swiglu(bench);
  time_optimizer(bench);
  time_embedding(bench);
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
