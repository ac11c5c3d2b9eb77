#include "kernels/rope.h"

#include <cmath>

#include "kernels/cpu/row_blocks.h"
#include "kernels/cpu/simd/rope.h"

namespace moemamba {

namespace {

// Positions whose angles come from one exact one by turning on, in double (about 1e-14 off in the
// end). Blocks begin at multiples of it, so that a position has the same bits in every call.
constexpr int64_t kBlock = 64;

// cos(p w_i) and sin(p w_i) of the positions first .. first + count, [count][2][dh / 2].
struct Table {
  float* values;
  int64_t first, count, half;
  double base;

  float* row(int64_t position) const { return values + (position - first) * 2 * half; }
  int64_t blocks() const {
    return count == 0 ? 0 : (first + count - 1) / kBlock - first / kBlock + 1;
  }
  void fill_block(int64_t block) const {
    const int64_t start = (first / kBlock + block) * kBlock;
    const int64_t end = std::min(start + kBlock, first + count);
    for (int64_t i = 0; i < half; ++i) {
      const double speed = std::pow(base, -double(i) / double(half));
      const double turn_cosine = std::cos(speed), turn_sine = std::sin(speed);
      double cosine = std::cos(double(start) * speed), sine = std::sin(double(start) * speed);
      for (int64_t position = start; position < end; ++position) {
        if (position >= first) {
          row(position)[i] = float(cosine);
          row(position)[half + i] = float(sine);
        }
        const double turned = cosine * turn_cosine - sine * turn_sine;
        sine = sine * turn_cosine + cosine * turn_sine;
        cosine = turned;
      }
    }
  }
};

void fill(Stream& stream, const Table& table) {
  stream.parallel_for(table.blocks(), [&](int64_t block) { table.fill_block(block); });
}

}  // namespace

const RopeKernels& rope_kernels(SimdLevel level) {
  return level == SimdLevel::avx512 ? avx512::rope_kernels : avx2::rope_kernels;
}

void Rope::check() const {
  const auto [T, F] = dims<2>("x[T, F]", x);
  expect_real("x[T, F]", x);
  expect("y[T, F]", y, {T, F}, x.dtype);
  if (starts) expect("starts[T]", starts, {T}, DType::u8);
  moemamba::check(sequences >= 1 ? T % sequences == 0 : sequences == 0 && T == 0,
                  "sequences must divide the T = ", T, " tokens, found ", sequences);
  moemamba::check(head_width >= 2 && head_width % 2 == 0,
                  "head_width must be even for rotary positions, found ", head_width);
  moemamba::check(F % head_width == 0, "x[T, F]: F must be a multiple of head_width = ", head_width,
                  ", found ", F);
  moemamba::check(first_position >= 0, "first_position must be at least 0, found ", first_position);
  moemamba::check(base > 1, "base must be greater than 1, found ", base);
}

// Workspace: a table of the positions as they run on, with `starts` also one from 0, and then each
// token's distance to its document's start (-1 where none came before it).
void run_cpu(Stream& stream, const Rope& op) {
  const int64_t T = op.x.rows();
  if (T == 0) return;
  const int64_t L = T / op.sequences, half = op.head_width / 2, floats = L * 2 * half;
  const size_t bytes = size_t(floats) * sizeof(float);
  std::byte* space = stream.workspace(op.starts ? 2 * bytes + size_t(T) * sizeof(int64_t) : bytes);
  const Table running{reinterpret_cast<float*>(space), op.first_position, L, half, op.base};
  const Table restarted{running.values + floats, 0, L, half, op.base};
  auto* distance = reinterpret_cast<int64_t*>(space + 2 * bytes);
  fill(stream, running);
  if (op.starts) {
    fill(stream, restarted);
    const uint8_t* starts = op.starts.as<uint8_t>();
    for (int64_t t = 0; t < T; ++t)
      distance[t] = starts[t] ? 0 : t % L == 0 || distance[t - 1] < 0 ? -1 : distance[t - 1] + 1;
  }
  const auto rotate = rope_kernels(simd_level()).rotate;
  for_row_blocks(stream, T, rows_per_block(op.x.cols()), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const bool restarts = op.starts && distance[t] >= 0;
      const float* angles =
          restarts ? restarted.row(distance[t]) : running.row(op.first_position + t % L);
      rotate({.x = op.x.row<float>(t),
              .cosines = angles,
              .sines = angles + half,
              .y = op.y.row<float>(t),
              .heads = op.x.cols() / op.head_width,
              .half = half,
              .inverse = op.inverse});
    }
  });
}

}  // namespace moemamba
