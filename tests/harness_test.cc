#include "tests/support/harness.h"

#include <gtest/gtest-spi.h>
#include <gtest/gtest.h>

#include <cmath>

namespace moemamba {

// y += x, where a stream with more than one thread is wrong by `error`: stands for a second
// backend that disagrees.
struct Shift {
  static constexpr auto name = "shift";
  Tensor x;     // [T, F] read
  Tensor rows;  // optional, never there
  Tensor y;     // [T, F] read and written
  float error = 0;
  static constexpr auto reads() { return std::tuple(&Shift::x, &Shift::rows); }
  static constexpr auto writes() { return std::tuple(&Shift::y); }
  void check() const {}
};

void run_cpu(Stream& stream, const Shift& op) {
  for (int64_t r = 0; r < op.x.rows(); ++r)
    for (int64_t c = 0; c < op.x.cols(); ++c)
      op.y.row<float>(r)[c] += op.x.row<float>(r)[c] + (stream.threads() > 1 ? op.error : 0);
}

// By way of the host's memory; whoever reads it there has a GPU.
void run_cuda(Stream& stream, const Shift& op) {
  Case keeper(1);
  const Tensor x = to_host(stream, op.x, keeper), y = to_host(stream, op.y, keeper);
  Stream host = Stream::immediate();
  run_cpu(host, Shift{.x = x, .y = y});
  copy(stream, y, op.y);
  stream.synchronize();
}

namespace {

void expect_agree_as_f32(const char* op, int where, const Tensor& found, const Tensor& expected) {
  expect_agree(op, where, found, expected, tolerance(DType::f32));
}

TEST(Harness, NumericGradientIsTheGradient) {
  const auto f = [](const std::vector<double>& x) { return std::sin(x[0]) * x[1] + x[1] * x[1]; };
  const auto g = numeric_gradient(f, {0.3, 100});
  EXPECT_NEAR(g[0], std::cos(0.3) * 100, 1e-7);
  EXPECT_NEAR(g[1], std::sin(0.3) + 200, 1e-7);
}

TEST(Harness, ComparesWhatTwoStreamsWrote) {
  Stream one = Stream::immediate(1), two = Stream::immediate(2);
  Case c(1);
  const Tensor x = c.normal({3, 5}), y = c.normal({3, 5});
  compare_runs(Shift{.x = x, .y = y}, one, two, expect_same_bits);
  compare_runs(Shift{.x = x, .y = y, .error = 1e-7f}, one, two, expect_agree_as_f32);
}

TEST(Harness, CopiesAnOperatorInPlaceInPlace) {
  Stream one = Stream::immediate(1), two = Stream::immediate(2);
  Case c(2);
  const Tensor x = c.values({2}, {1, 2});
  compare_runs(Shift{.x = x, .y = x}, one, two, expect_same_bits);
  EXPECT_EQ(to_doubles(x), (std::vector<double>{2, 4}));
}

template <class Compare>
void compare_wrong_by(float error, Compare compare) {
  Stream one = Stream::immediate(1), two = Stream::immediate(2);
  Case c(3);
  compare_runs(Shift{.x = c.normal({3, 5}), .y = c.normal({3, 5}), .error = error}, one, two,
               compare);
}

TEST(Harness, NamesTheWorstElementOfBackendsThatDisagree) {
  EXPECT_NONFATAL_FAILURE(compare_wrong_by(0.01f, expect_agree_as_f32),
                          "shift, written tensor 0 [3, 5]: relative error");
  EXPECT_NONFATAL_FAILURE(compare_wrong_by(1e-6f, expect_same_bits), "the bits differ at row 0");
}

TEST(Harness, CountsNoComparisonWithoutAnotherBackend) {
  Case c(5);
  const Tensor x = c.values({2}, {1, 2}), y = c.values({2}, {10, 20});
  expect_backends_agree(Shift{.x = x, .y = y});
  EXPECT_EQ(to_doubles(y), (std::vector<double>{11, 22}));
  const testing::TestResult* result =
      testing::UnitTest::GetInstance()->current_test_info()->result();
  EXPECT_EQ(result->test_property_count() > 0, other_backend().has_value());
}

TEST(Cases, AreEqualForEqualSeeds) {
  Case first(7), second(7), other(8);
  const auto values = to_doubles(first.normal({4, 5}));
  EXPECT_EQ(values, to_doubles(second.normal({4, 5})));
  EXPECT_NE(values, to_doubles(other.normal({4, 5})));
  EXPECT_NE(values, to_doubles(first.normal({4, 5})));
}

TEST(Cases, FillWhatNobodyWroteWithNaN) {
  Case c(9);
  const Tensor padded = c.zeros({2, 3});
  ASSERT_GT(padded.stride, padded.cols());
  EXPECT_TRUE(std::isnan(padded.row<float>(0)[3]));
  for (double value : to_doubles(c.empty({3, 2}, DType::bf16))) EXPECT_TRUE(std::isnan(value));
}

TEST(Cases, CountNaNAsInfinitelyWrong) {
  EXPECT_EQ(relative_error({NAN, 1}, {1, 1}), INFINITY);
  EXPECT_EQ(relative_error({0, 0}, {0, 0}), 0);
  EXPECT_DOUBLE_EQ(relative_error({3, 4.5}, {3, 4}), 0.1);
  Case c(10);
  const Tensor found = c.values({2, 2}, {1, 2, 3, 5});
  const std::vector<double> expected{1, 2, 3, 4};
  EXPECT_NONFATAL_FAILURE(expect_close("y", found, expected),
                          "worst at row 1, column 1: found 5, expected 4");
}

}  // namespace
}  // namespace moemamba
