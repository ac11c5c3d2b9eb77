#pragma once
#include <cmath>

#include "kernels/bias.h"
#include "kernels/rope.h"
#include "tests/support/cases.h"

namespace moemamba::definition {  // letters: T = B L tokens, F columns, dh width of a head

// The rotation of every pair by its position's angle.
inline std::vector<double> rope(const Rope& op, const std::vector<double>& x) {
  const size_t T = size_t(op.x.rows()), F = size_t(op.x.cols()), dh = size_t(op.head_width);
  const std::vector<double> starts = op.starts ? to_doubles(op.starts) : std::vector<double>(T);
  std::vector<double> y(x.size());
  double position = 0;
  for (size_t t = 0; t < T; ++t) {
    position = t % (T / size_t(op.sequences)) == 0 ? double(op.first_position) : position + 1;
    if (starts[t] != 0) position = 0;
    for (size_t head = 0; head < F / dh; ++head)
      for (size_t i = 0; i < dh / 2; ++i) {
        const double angle = position * std::pow(op.base, -2.0 * double(i) / double(dh));
        const double cosine = std::cos(angle), sine = std::sin(op.inverse ? -angle : angle);
        const size_t a = t * F + head * dh + i, b = a + dh / 2;
        y[a] = x[a] * cosine - x[b] * sine;
        y[b] = x[b] * cosine + x[a] * sine;
      }
  }
  return y;
}

// x[T, F] + row t mod R of table[R, F]: a bias (R = 1) or positions (R = L).
inline std::vector<double> add_rows(std::vector<double> x, const std::vector<double>& table) {
  for (size_t i = 0; i < x.size(); ++i) x[i] += table[i % table.size()];
  return x;
}

// The gradient of a table of `elements`.
inline std::vector<double> sum_rows(const std::vector<double>& dy, size_t elements) {
  std::vector<double> sums(elements);
  for (size_t i = 0; i < dy.size(); ++i) sums[i % elements] += dy[i];
  return sums;
}

}  // namespace moemamba::definition
