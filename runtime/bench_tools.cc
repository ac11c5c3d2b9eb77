#include "runtime/bench_tools.h"

#include <algorithm>
#include <chrono>

#include "core/gpu.h"
#include "core/random.h"

namespace moemamba {

namespace {

constexpr int64_t kWarmUps = 3;
constexpr int64_t kPeriod = 65537;

}  // namespace

std::vector<double> time_on_host(int64_t repeat, FunctionRef<void()> work,
                                 FunctionRef<void()> before) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> seconds;
  for (int64_t i = -std::min(repeat, kWarmUps); i < repeat; ++i) {
    before();
    const auto start = Clock::now();
    work();
    if (i >= 0) seconds.push_back(std::chrono::duration<double>(Clock::now() - start).count());
  }
  return seconds;
}

std::vector<double> time_runs(Stream& stream, int64_t repeat, FunctionRef<void()> work,
                              FunctionRef<void()> before) {
  if (stream.device() == DeviceKind::cpu) return time_on_host(repeat, work, before);
  for (int64_t i = 0; i < std::min(repeat, kWarmUps); ++i) work();
  std::vector<double> seconds;
  for (int64_t i = 0; i < repeat; ++i) {
    before();
    work();
    const std::shared_ptr<void> begin = gpu::mark(stream);
    work();
    const std::shared_ptr<void> end = gpu::mark(stream);
    stream.synchronize();  // under the eyes of the stream's watcher
    seconds.push_back(gpu::seconds_between(begin, end));
  }
  return seconds;
}

std::vector<double> time_runs(Stream& stream, int64_t repeat, FunctionRef<void()> work) {
  return time_runs(stream, repeat, work, [] {});
}

double median(std::vector<double> values) {
  const auto middle = values.begin() + std::ptrdiff_t(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

BenchTensors::BenchTensors(Stream& stream) : stream_(stream) {
  const Random random(1, "bench");
  numbers_.reserve(size_t(kPeriod));
  for (int64_t i = 0; i < kPeriod; ++i) numbers_.push_back(float(random.normal(uint64_t(i))));
}

// The whole buffer is filled, what is between rows included: its begin from the host, the rest in
// copies of what is there, twice as much each time.
Tensor BenchTensors::take(Shape shape, DType dtype, int64_t stride, double scale) {
  const int64_t count = shape.rows() * stride;
  buffers_.emplace_back(stream_.device(), std::max<int64_t>(count, 1) * size_of(dtype));
  Tensor tensor = view(buffers_.back(), 0, shape, dtype);
  tensor.stride = stride;
  if (scale == 0 || count == 0) return tensor;
  const Tensor flat = view(buffers_.back(), 0, {1, count}, dtype);
  int64_t done = std::min(count, kPeriod);
  std::vector<float> wide(numbers_.begin(), numbers_.begin() + done);
  for (float& number : wide) number *= float(scale);
  std::vector<bf16> narrow;
  if (dtype == DType::bf16)
    for (float number : wide) narrow.push_back(bf16(number));
  const Tensor host =
      dtype == DType::bf16 ? view(narrow.data(), {1, done}) : view(wide.data(), {1, done});
  copy(stream_, host, flat.column_range(0, done));
  stream_.synchronize();
  for (int64_t more = 0; done < count; done += more) {
    more = std::min(done, count - done);
    copy(stream_, flat.column_range(0, more), flat.column_range(done, done + more));
  }
  return tensor;
}

Tensor BenchTensors::rows(Shape shape, DType dtype) {
  const int64_t border = 16 / size_of(dtype);
  return take(shape, dtype, (shape.last() + border - 1) / border * border, 1);
}

Tensor BenchTensors::dense(Shape shape, DType dtype, double scale) {
  return take(shape, dtype, shape.last(), scale);
}

Tensor BenchTensors::zeros(Shape shape, DType dtype) {
  return take(shape, dtype, shape.last(), 0);
}

std::string sizes_text(std::initializer_list<int64_t> sizes) {
  std::string text;
  for (int64_t size : sizes) text += concat(text.empty() ? "" : " x ", size);
  return text;
}

}  // namespace moemamba
