#pragma once
#include <deque>
#include <string>
#include <vector>

#include "core/arena.h"

namespace moemamba {

// What the measurements of `moemamba bench` share.

// Seconds of `repeat` runs of `work` on a stream, after up to three more of them. On a GPU between
// marks in the stream, each run behind another one, so that the GPU does not wait for the host.
// `before` runs on the host ahead of each: a barrier, where ranks work together.
std::vector<double> time_runs(Stream& stream, int64_t repeat, FunctionRef<void()> work,
                              FunctionRef<void()> before);
std::vector<double> time_runs(Stream& stream, int64_t repeat, FunctionRef<void()> work);
// The same by the host's clock, for work that ends on the host.
std::vector<double> time_on_host(int64_t repeat, FunctionRef<void()> work,
                                 FunctionRef<void()> before);
double median(std::vector<double> values);  // REQUIRES: not empty; of an even number the upper one

// Tensors where a stream works; their memory goes with this. They hold normal numbers (a period of
// 65537 of them, again and again), because zeros would let a GPU clock higher than training does.
class BenchTensors {
 public:
  explicit BenchTensors(Stream& stream);
  Tensor rows(Shape shape, DType dtype);  // each padded to 16 bytes, as an arena's are
  Tensor dense(Shape shape, DType dtype = DType::f32, double scale = 1);
  Tensor zeros(Shape shape, DType dtype = DType::f32);
  template <class T>
  Tensor values(const std::vector<T>& values) {
    const Tensor tensor = zeros({int64_t(values.size())}, dtype_of<T>());
    copy(stream_, view(const_cast<T*>(values.data()), tensor.shape), tensor);
    stream_.synchronize();
    return tensor;
  }

 private:
  Tensor take(Shape shape, DType dtype, int64_t stride, double scale);
  Stream& stream_;
  std::vector<float> numbers_;
  std::deque<Buffer> buffers_;
};

// "64 x 1024".
std::string sizes_text(std::initializer_list<int64_t> sizes);

}  // namespace moemamba
