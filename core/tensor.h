#pragma once
#include <array>
#include <cstddef>
#include <initializer_list>
#include <string>
#include <type_traits>

#include "core/dtype.h"

namespace moemamba {

enum class DeviceKind : uint8_t { cpu, cuda };

// Up to four extents, outermost first.
struct Shape {
  std::array<int64_t, 4> extents{};
  int dims = 0;

  Shape() = default;
  Shape(std::initializer_list<int64_t> list);
  int64_t operator[](int dim) const { return extents[dim]; }
  int64_t last() const { return dims ? extents[dims - 1] : 1; }
  int64_t elements() const;
  int64_t rows() const;  // product of all extents but the last
  bool operator==(const Shape& other) const;
};
std::string to_string(const Shape& shape);  // "[3, 4]"

// A view of memory that somebody else owns: row-major, rows `stride` elements apart. Rows that an
// Arena hands out start on 16-byte borders, so stride may exceed the last extent.
struct Tensor {
  void* data = nullptr;
  Shape shape;
  int64_t stride = 0;  // elements from one row to the next
  DType dtype = DType::f32;
  DeviceKind device = DeviceKind::cpu;

  explicit operator bool() const { return data != nullptr; }
  int64_t rows() const { return shape.rows(); }
  int64_t cols() const { return shape.last(); }
  int64_t elements() const { return shape.elements(); }
  int64_t bytes() const { return elements() * size_of(dtype); }
  bool dense() const { return stride == cols() || rows() <= 1; }

  template <class T>
  T* as() const {
    check(dtype == dtype_of<T>(), "expected ", name_of(dtype_of<T>()), ", found ", name_of(dtype));
    return static_cast<T*>(data);
  }
  template <class T>
  T* row(int64_t r) const { return static_cast<T*>(data) + r * stride; }

  Tensor row_range(int64_t begin, int64_t end) const;     // rows of the flattened [rows, cols]
  Tensor column_range(int64_t begin, int64_t end) const;  // keeps the stride; any alignment
  Tensor reshaped(Shape to) const;                        // REQUIRES: dense() or the same cols
};
static_assert(std::is_trivially_copyable_v<Tensor>);

// A dense view of `data`.
Tensor view(void* data, Shape shape, DType dtype, DeviceKind device = DeviceKind::cpu);
template <class T>
Tensor view(T* data, Shape shape) { return view(data, shape, dtype_of<T>()); }

// Token rows sorted by expert: capacity rows, of which group e holds offsets[e] .. offsets[e + 1].
struct Rows {
  Tensor values;   // [capacity, D]
  Tensor offsets;  // [E + 1] i32
};

// The extents of `tensor`, which must have N of them: `const auto [T, D] = dims<2>("x[T, D]", x);`
template <int N>
std::array<int64_t, N> dims(const char* what, const Tensor& tensor) {
  check(tensor.shape.dims == N, what, " must have ", N, " dims, found ", to_string(tensor.shape));
  std::array<int64_t, N> extents;
  for (int i = 0; i < N; ++i) extents[i] = tensor.shape[i];
  return extents;
}

// Throws unless `tensor` has this shape (and dtype), naming both.
void expect(const char* what, const Tensor& tensor, Shape shape, DType dtype = DType::f32);
// Throws unless `tensor` is there and holds f32 or bf16.
void expect_real(const char* what, const Tensor& tensor);

}  // namespace moemamba
