#include "core/tensor.h"

namespace moemamba {

Shape::Shape(std::initializer_list<int64_t> list) {
  check(list.size() <= extents.size(), "a shape has at most 4 dims, found ", list.size());
  for (int64_t extent : list) {
    check(extent >= 0, "an extent is at least 0, found ", extent);
    extents[dims++] = extent;
  }
}

int64_t Shape::elements() const {
  int64_t product = 1;
  for (int i = 0; i < dims; ++i) product *= extents[i];
  return product;
}

int64_t Shape::rows() const {
  int64_t product = 1;
  for (int i = 0; i + 1 < dims; ++i) product *= extents[i];
  return product;
}

bool Shape::operator==(const Shape& other) const {
  if (dims != other.dims) return false;
  for (int i = 0; i < dims; ++i)
    if (extents[i] != other.extents[i]) return false;
  return true;
}

std::string to_string(const Shape& shape) {
  std::string text = "[";
  for (int i = 0; i < shape.dims; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

Tensor Tensor::row_range(int64_t begin, int64_t end) const {
  check(0 <= begin && begin <= end && end <= rows(), "rows ", begin, " .. ", end, " of a tensor ",
        to_string(shape));
  Tensor part = *this;
  part.data = static_cast<char*>(data) + begin * stride * size_of(dtype);
  part.shape = {end - begin, cols()};
  return part;
}

Tensor Tensor::column_range(int64_t begin, int64_t end) const {
  check(0 <= begin && begin <= end && end <= cols(), "columns ", begin, " .. ", end,
        " of a tensor ", to_string(shape));
  Tensor part = *this;
  part.data = static_cast<char*>(data) + begin * size_of(dtype);
  part.shape = {rows(), end - begin};
  return part;
}

Tensor Tensor::reshaped(Shape to) const {
  check(to.elements() == elements(), "cannot view ", to_string(shape), " as ", to_string(to));
  check(dense() || to.last() == cols(), "rows of ", to_string(shape), " are padded");
  Tensor other = *this;
  other.shape = to;
  if (to.last() != cols()) other.stride = to.last();
  return other;
}

Tensor view(void* data, Shape shape, DType dtype, DeviceKind device) {
  return {.data = data, .shape = shape, .stride = shape.last(), .dtype = dtype, .device = device};
}

void expect(const char* what, const Tensor& tensor, Shape shape, DType dtype) {
  check(tensor.data != nullptr, what, ": expected ", to_string(shape), ", found no tensor");
  check(tensor.shape == shape, what, ": expected ", to_string(shape), ", found ",
        to_string(tensor.shape));
  check(tensor.dtype == dtype, what, ": expected ", name_of(dtype), ", found ",
        name_of(tensor.dtype));
}

void expect_real(const char* what, const Tensor& tensor) {
  check(tensor.data != nullptr, what, ": expected f32 or bf16, found no tensor");
  check(tensor.dtype == DType::f32 || tensor.dtype == DType::bf16, what,
        ": expected f32 or bf16, found ", name_of(tensor.dtype));
}

}  // namespace moemamba
