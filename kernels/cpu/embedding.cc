#include "kernels/embedding.h"

#include <cstring>

#include "kernels/cpu/row_blocks.h"
#include "kernels/cpu/simd/pointwise.h"

namespace moemamba {

namespace {
constexpr int64_t kColumns = 64;  // of the gradient that one thread walks through all tokens
}

void EmbeddingForward::check() const {
  const auto [T] = dims<1>("ids[T]", ids);
  const auto [V, D] = dims<2>("table[V, D]", table);
  expect("ids[T]", ids, {T}, DType::i32);
  expect_real("table[V, D]", table);
  expect_real("y[T, D]", y);
  expect("y[T, D]", y, {T, D}, y.dtype);
}

void EmbeddingBackward::check() const {
  const auto [T] = dims<1>("ids[T]", ids);
  const auto [V, D] = dims<2>("dtable[V, D]", dtable);
  expect("ids[T]", ids, {T}, DType::i32);
  expect_real("dy[T, D]", dy);
  expect("dy[T, D]", dy, {T, D}, dy.dtype);
  expect("dtable[V, D]", dtable, {V, D});
}

void run_cpu(Stream& stream, const EmbeddingForward& op) {
  const int32_t* ids = op.ids.as<int32_t>();
  const int64_t D = op.table.cols();
  for_row_blocks(stream, op.y.rows(), rows_per_block(D), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      std::memcpy(op.y.row<float>(t), op.table.row<float>(ids[t]), size_t(D) * sizeof(float));
  });
}

// Threads share the columns, so that each sum runs over the tokens in order.
void run_cpu(Stream& stream, const EmbeddingBackward& op) {
  const int32_t* ids = op.ids.as<int32_t>();
  const int64_t T = op.ids.elements(), V = op.dtable.rows();
  const auto add = pointwise_kernels(simd_level()).add;
  for_row_blocks(stream, op.dtable.cols(), kColumns, [&](int64_t begin, int64_t end) {
    for (int64_t v = 0; v < V && !op.accumulate; ++v)
      std::fill(op.dtable.row<float>(v) + begin, op.dtable.row<float>(v) + end, 0.f);
    for (int64_t t = 0; t < T; ++t) {
      float* sum = op.dtable.row<float>(ids[t]) + begin;
      add(sum, op.dy.row<float>(t) + begin, sum, end - begin);
    }
  });
}

}  // namespace moemamba
