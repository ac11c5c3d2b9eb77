#pragma once
#include <deque>
#include <vector>

#include "core/arena.h"
#include "core/random.h"

namespace moemamba {

// Seeded tensors for one test. Owns their memory; equal seeds give equal cases everywhere. Memory
// between rows (padding) and of empty() tensors is filled with NaN, so that reading it shows.
class Case {
 public:
  explicit Case(uint64_t seed) : random_(seed, "case") {}
  Tensor normal(Shape shape, double scale = 1, DType dtype = DType::f32);
  Tensor uniform(Shape shape, double low, double high, DType dtype = DType::f32);
  Tensor integers(Shape shape, int64_t low, int64_t high);  // i32 in [low, high]
  Tensor bytes(Shape shape, double probability_of_one);     // u8, 0 or 1
  Tensor values(Shape shape, const std::vector<double>& values, DType dtype = DType::f32);
  Tensor empty(Shape shape, DType dtype = DType::f32);
  Tensor zeros(Shape shape, DType dtype = DType::f32);
  Tensor copy_of(const Tensor& tensor);
  // The same values in `dtype`; rows as empty() lays them out, or, aligned, on 16-byte borders as
  // an Arena does.
  Tensor copy_as(const Tensor& tensor, DType dtype, bool aligned = false);

 private:
  Tensor unwritten(Shape shape, DType dtype, int64_t stride);
  std::deque<Buffer> buffers_;
  Random random_;
  uint64_t next_ = 0;
};

// Elements row by row as doubles, whatever the dtype and stride; and back.
std::vector<double> to_doubles(const Tensor& tensor);
void from_doubles(const std::vector<double>& values, const Tensor& tensor);

// ||found - expected|| / ||expected|| (absolute where expected is zero); NaN counts as infinity.
double relative_error(const std::vector<double>& found, const std::vector<double>& expected);

// The one tolerance table: how far an operator's f32 or bf16 result may be from its definition in
// double precision, as relative_error of the whole tensor.
double tolerance(DType dtype);  // f32 1e-5, bf16 1e-2

// Fails (EXPECT) unless relative_error is within tolerance(dtype), or `bound` where one is given;
// names the worst element.
void expect_close(const char* what, const Tensor& found, const std::vector<double>& expected,
                  double bound = 0);

}  // namespace moemamba
