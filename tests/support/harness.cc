#include "tests/support/harness.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "core/gpu.h"

namespace moemamba {

namespace {
constexpr const char* kComparisons = "backend_comparisons";
}

std::vector<double> numeric_gradient(std::function<double(const std::vector<double>&)> f,
                                     std::vector<double> x) {
  std::vector<double> gradient(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    const double at = x[i], h = 1e-4 * std::max(1.0, std::abs(at));
    const auto f_at = [&](double steps) {
      x[i] = at + steps * h;
      return f(x);
    };
    const double near = f_at(1) - f_at(-1), far = f_at(2) - f_at(-2);
    gradient[i] = (8 * near - far) / (12 * h);
    x[i] = at;
  }
  return gradient;
}

double weighted_sum(const std::vector<double>& values, const std::vector<double>& weights) {
  check(values.size() == weights.size(), "weighted_sum: ", values.size(), " values and ",
        weights.size(), " weights");
  double total = 0;
  for (size_t i = 0; i < values.size(); ++i) total += values[i] * weights[i];
  return total;
}

void expect_gradient(const char* what, const std::vector<double>& analytic,
                     std::function<double(const std::vector<double>&)> f,
                     const std::vector<double>& x) {
  const double error = relative_error(analytic, numeric_gradient(std::move(f), x));
  EXPECT_LE(error, 1e-7) << what << ": the definition's backward is not its forward's gradient";
}

// A test's properties hold the count, so that no variable of the program has to.
void count_comparison() {
  const testing::TestInfo* test = testing::UnitTest::GetInstance()->current_test_info();
  check(test != nullptr, "backends are compared inside of a test only");
  int count = 1;
  for (int i = 0; i < test->result()->test_property_count(); ++i) {
    const testing::TestProperty& property = test->result()->GetTestProperty(i);
    if (property.key() == std::string(kComparisons)) count += std::stoi(property.value());
  }
  testing::Test::RecordProperty(kComparisons, count);
}

std::optional<Stream> other_backend() {
  if (gpu::devices().empty()) return std::nullopt;
  return Stream::cuda();
}

Tensor to_host(Stream& stream, const Tensor& tensor, Case& keeper) {
  Tensor host = keeper.empty(tensor.shape, tensor.dtype);
  copy(stream, tensor, host);
  stream.synchronize();
  return host;
}

void expect_agree(const char* op, int where, const Tensor& found, const Tensor& expected,
                  double bound) {
  const std::string what = concat(op, ", written tensor ", where);
  const bool real =
      found.dtype == DType::f32 || found.dtype == DType::bf16 || found.dtype == DType::f64;
  if (real) return expect_close(what.c_str(), found, to_doubles(expected), bound);
  expect_same_bits(op, where, found, expected);
}

void expect_same_bits(const char* op, int where, const Tensor& found, const Tensor& expected) {
  const int64_t size = size_of(found.dtype);
  for (int64_t r = 0; r < found.rows(); ++r)
    for (int64_t c = 0; c < found.cols(); ++c) {
      const auto address = [&](const Tensor& tensor) {
        return static_cast<const char*>(tensor.data) + (r * tensor.stride + c) * size;
      };
      if (std::memcmp(address(found), address(expected), size_t(size)) == 0) continue;
      ADD_FAILURE() << op << ", written tensor " << where << " " << to_string(found.shape)
                    << ": the bits differ at row " << r << ", column " << c;
      return;
    }
}

}  // namespace moemamba
