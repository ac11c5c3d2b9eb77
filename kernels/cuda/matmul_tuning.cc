#include "kernels/matmul_tuning.h"

#include <algorithm>
#include <ostream>
#include <vector>

#include "core/file.h"
#include "core/gpu.h"
#include "core/random.h"
#include "kernels/cuda/blas.h"
#include "kernels/cuda/matmul_table.h"

namespace moemamba {

namespace {

constexpr int kRuns = 20, kWarmUps = 3;

// Numbers below one in size; zeros would let the GPU clock higher than training. What is between
// rows is filled like them.
class RandomTensor {
 public:
  struct Form {
    Shape shape;
    int64_t stride;  // 0: dense
    DType dtype;
  };
  RandomTensor(Stream& stream, const Form& form, const char* purpose)
      : buffer_(DeviceKind::cuda, std::max<int64_t>(elements(form), 1) * size_of(form.dtype)),
        tensor_(view(buffer_, 0, form.shape, form.dtype)) {
    if (form.stride > 0) tensor_.stride = form.stride;
    constexpr int64_t kPeriod = 65537;
    const Random random(1, purpose);
    std::vector<float> values;
    for (int64_t i = 0; i < kPeriod; ++i)
      values.push_back(float(2 * random.uniform(uint64_t(i)) - 1));
    const int64_t count = elements(form);
    Buffer host = Buffer::staging(DeviceKind::cuda, buffer_.bytes());
    for (int64_t i = 0; i < count; ++i) {
      const float value = values[size_t(i % kPeriod)];
      if (form.dtype == DType::bf16) reinterpret_cast<bf16*>(host.data())[i] = bf16(value);
      else reinterpret_cast<float*>(host.data())[i] = value;
    }
    copy(stream, view(host.data(), {1, count}, form.dtype),
         view(buffer_, 0, {1, count}, form.dtype));
    stream.synchronize();
  }
  const Tensor& tensor() const { return tensor_; }

 private:
  static int64_t elements(const Form& form) {
    return form.shape.rows() * std::max(form.stride, form.shape.last());
  }
  Buffer buffer_;
  Tensor tensor_;
};

// Microseconds of one call of work, the median of kRuns. Each stands behind another one, so that
// the GPU never waits for the host.
template <class Work>
double median(Stream& stream, const Work& work) {
  for (int i = 0; i < kWarmUps; ++i) work();
  std::vector<double> times;
  for (int i = 0; i < kRuns; ++i) {
    work();
    const std::shared_ptr<void> begin = gpu::mark(stream);
    work();
    const std::shared_ptr<void> end = gpu::mark(stream);
    times.push_back(gpu::seconds_between(begin, end) * 1e6);
  }
  std::nth_element(times.begin(), times.begin() + kRuns / 2, times.end());
  return times[kRuns / 2];
}

std::string text_of(const TunedProduct& line) {
  const ProductShape& s = line.shape;
  const auto dtype = [](DType dtype) { return concat("DType::", name_of(dtype)); };
  const auto flag = [](bool flag) { return flag ? "true" : "false"; };
  std::string text = concat("{", line.version, ", \"", line.gpu, "\", {", s.M, ", ", s.N, ", ", s.K,
                            ", ", flag(s.a_transposed), ", ", flag(s.b_transposed), ",\n  ",
                            dtype(s.a), ", ", dtype(s.b), ", ", dtype(s.out), ", ",
                            flag(s.accumulate), "},\n {");
  for (size_t i = 0; i < line.algorithm.size(); ++i)
    text += concat(i % 4 == 0 && i > 0 ? "\n  " : "", line.algorithm[i], "u",
                   i + 1 == line.algorithm.size() ? "" : i % 4 == 3 ? "," : ", ");
  return text + "}},\n";
}

constexpr TunedProduct kTable[] = {
#include "kernels/cuda/matmul_table.inc"
    {},  // so that an empty table is one; no version is 0
};

void tune(Stream& stream, const TuningCase& product, std::ostream& out) {
  const ProductShape& shape = product.shape;
  const auto sides = [](bool transposed, int64_t rows, int64_t cols) {
    return transposed ? Shape{cols, rows} : Shape{rows, cols};
  };
  const RandomTensor a(
      stream, {sides(shape.a_transposed, shape.M, shape.K), product.a_stride, shape.a}, "a"),
      b(stream, {sides(shape.b_transposed, shape.K, shape.N), product.b_stride, shape.b}, "b"),
      result(stream, {{shape.M, shape.N}, product.out_stride, shape.out}, "out");
  const Matmul op{.a = a.tensor(),
                  .b = b.tensor(),
                  .out = result.tensor(),
                  .a_transposed = shape.a_transposed,
                  .b_transposed = shape.b_transposed,
                  .accumulate = shape.accumulate};
  op.check();
  Blas& blas = Blas::of(stream);
  double rule = 0, best = 0;
  const cublasLtMatmulAlgo_t* fastest = nullptr;
  const std::vector<cublasLtMatmulAlgo_t> candidates = blas.candidates(op);
  for (const cublasLtMatmulAlgo_t& candidate : candidates) {
    if (!blas.multiply_by(stream, op, candidate)) continue;
    const double time = median(stream, [&] { blas.multiply_by(stream, op, candidate); });
    if (&candidate == candidates.data()) rule = time;
    if (fastest && time >= best) continue;
    fastest = &candidate;
    best = time;
  }
  if (!fastest) {
    out << "// " << shape.M << " x " << shape.N << " x " << shape.K << ": no algorithm\n";
    return;
  }
  TunedProduct line{cublasLtGetVersion(), blas.gpu_name(), shape, {}};
  std::copy_n(fastest->data, line.algorithm.size(), line.algorithm.begin());
  out << "// " << best << " us, the rule's choice " << rule << " us, of " << candidates.size()
      << "\n" << text_of(line);
}

}  // namespace

std::span<const TunedProduct> matmul_table() {
  return std::span(kTable).first(std::size(kTable) - 1);
}

std::string matmul_table_digest() {
  Sha256 digest;
  for (const TunedProduct& line : matmul_table()) digest.add(text_of(line));
  return digest.hex();
}

std::vector<TuningCase> products_met(Stream& stream) {
  check(stream.device() == DeviceKind::cuda, "matmul algorithms are tuned on a GPU's stream");
  std::vector<TuningCase> list;
  for (const Product& product : Blas::of(stream).products())  // in order of their shapes
    if (list.empty() || list.back().shape != product.shape)
      list.push_back({product.shape, product.a_stride, product.b_stride, product.out_stride});
  return list;
}

void tune_matmul(Stream& stream, std::span<const TuningCase> products, std::ostream& out) {
  check(stream.device() == DeviceKind::cuda, "matmul algorithms are tuned on a GPU's stream");
  for (const TuningCase& product : products) {
    tune(stream, product, out);
    out.flush();
  }
}

}  // namespace moemamba
