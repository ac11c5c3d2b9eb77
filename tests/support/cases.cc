#include "tests/support/cases.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

namespace moemamba {

namespace {

// Elements between two rows beyond a row's own, so that code that ignores the stride shows.
constexpr int64_t kPadding = 3;

template <class Fn>
void visit(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::f32:
      return fn.template operator()<float>();
    case DType::bf16:
      return fn.template operator()<bf16>();
    case DType::f64:
      return fn.template operator()<double>();
    case DType::i32:
      return fn.template operator()<int32_t>();
    case DType::i64:
      return fn.template operator()<int64_t>();
    case DType::u8:
      return fn.template operator()<uint8_t>();
  }
}

template <class T>
T from_double(double value) {
  if constexpr (std::is_same_v<T, bf16>)
    return bf16(float(value));
  else
    return T(value);
}

template <class T>
double as_double(T value) {
  if constexpr (std::is_same_v<T, bf16>)
    return double(float(value));
  else
    return double(value);
}

// What memory holds that no test has written: NaN, or a number that is no valid index.
template <class T>
T unwritten_of() {
  if constexpr (std::is_integral_v<T>)
    return std::numeric_limits<T>::max();
  else
    return from_double<T>(std::numeric_limits<double>::quiet_NaN());
}

}  // namespace

Tensor Case::unwritten(Shape shape, DType dtype, int64_t stride) {
  const int64_t count = stride * shape.rows();
  buffers_.emplace_back(DeviceKind::cpu, std::max<int64_t>(count, 1) * size_of(dtype));
  void* data = buffers_.back().data();
  visit(dtype, [&]<class T>() { std::fill_n(static_cast<T*>(data), count, unwritten_of<T>()); });
  Tensor tensor = view(data, shape, dtype);
  tensor.stride = stride;
  return tensor;
}

Tensor Case::empty(Shape shape, DType dtype) {
  const bool padded = shape.dims > 1 && shape.rows() > 1;
  return unwritten(shape, dtype, shape.last() + (padded ? kPadding : 0));
}

Tensor Case::copy_as(const Tensor& tensor, DType dtype, bool aligned) {
  const int64_t pack = 16 / size_of(dtype), cols = tensor.cols();
  const Tensor copy = aligned ? unwritten(tensor.shape, dtype, (cols + pack - 1) / pack * pack)
                              : empty(tensor.shape, dtype);
  from_doubles(to_doubles(tensor), copy);
  return copy;
}

Tensor Case::values(Shape shape, const std::vector<double>& values, DType dtype) {
  Tensor tensor = empty(shape, dtype);
  from_doubles(values, tensor);
  return tensor;
}

Tensor Case::normal(Shape shape, double scale, DType dtype) {
  std::vector<double> list(size_t(shape.elements()));
  for (double& value : list) value = scale * random_.normal(next_++);
  return values(shape, list, dtype);
}

Tensor Case::uniform(Shape shape, double low, double high, DType dtype) {
  std::vector<double> list(size_t(shape.elements()));
  for (double& value : list) value = low + (high - low) * random_.uniform(next_++);
  return values(shape, list, dtype);
}

Tensor Case::integers(Shape shape, int64_t low, int64_t high) {
  std::vector<double> list(size_t(shape.elements()));
  for (double& value : list)
    value = double(low + int64_t(random_.integer(next_++, uint64_t(high - low + 1))));
  return values(shape, list, DType::i32);
}

Tensor Case::bytes(Shape shape, double probability_of_one) {
  std::vector<double> list(size_t(shape.elements()));
  for (double& value : list) value = random_.uniform(next_++) < probability_of_one ? 1 : 0;
  return values(shape, list, DType::u8);
}

Tensor Case::zeros(Shape shape, DType dtype) {
  return values(shape, std::vector<double>(size_t(shape.elements())), dtype);
}

Tensor Case::copy_of(const Tensor& tensor) {
  return values(tensor.shape, to_doubles(tensor), tensor.dtype);
}

std::vector<double> to_doubles(const Tensor& tensor) {
  std::vector<double> list;
  list.reserve(size_t(tensor.elements()));
  visit(tensor.dtype, [&]<class T>() {
    for (int64_t r = 0; r < tensor.rows(); ++r)
      for (int64_t c = 0; c < tensor.cols(); ++c) list.push_back(as_double(tensor.row<T>(r)[c]));
  });
  return list;
}

void from_doubles(const std::vector<double>& values, const Tensor& tensor) {
  check(int64_t(values.size()) == tensor.elements(), "a tensor ", to_string(tensor.shape),
        " needs ", tensor.elements(), " values, found ", values.size());
  size_t next = 0;
  visit(tensor.dtype, [&]<class T>() {
    for (int64_t r = 0; r < tensor.rows(); ++r)
      for (int64_t c = 0; c < tensor.cols(); ++c)
        tensor.row<T>(r)[c] = from_double<T>(values[next++]);
  });
}

double relative_error(const std::vector<double>& found, const std::vector<double>& expected) {
  check(found.size() == expected.size(), "expected ", expected.size(), " values, found ",
        found.size());
  double difference = 0, size = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    difference += (found[i] - expected[i]) * (found[i] - expected[i]);
    size += expected[i] * expected[i];
  }
  const double error = size > 0 ? std::sqrt(difference / size) : std::sqrt(difference);
  return std::isnan(error) ? std::numeric_limits<double>::infinity() : error;
}

double tolerance(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return 1e-5;
    case DType::bf16:
      return 1e-2;
    case DType::f64:
      return 1e-12;
    default:
      return 0;
  }
}

void expect_close(const char* what, const Tensor& found, const std::vector<double>& expected,
                  double bound) {
  if (bound == 0) bound = tolerance(found.dtype);
  const std::vector<double> values = to_doubles(found);
  const double error = relative_error(values, expected);
  if (error <= bound) return;
  size_t worst = 0;
  double largest = -1;
  for (size_t i = 0; i < values.size(); ++i) {
    double distance = std::abs(values[i] - expected[i]);
    if (std::isnan(distance)) distance = std::numeric_limits<double>::infinity();
    if (distance > largest) largest = distance, worst = i;
  }
  ADD_FAILURE() << what << " " << to_string(found.shape) << ": relative error " << error
                << ", at most " << bound << " is allowed; worst at row "
                << worst / size_t(found.cols()) << ", column " << worst % size_t(found.cols())
                << ": found " << values[worst] << ", expected " << expected[worst];
}

}  // namespace moemamba
