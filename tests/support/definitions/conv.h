#pragma once
#include "kernels/conv.h"
#include "tests/support/cases.h"
#include "tests/support/definitions/pointwise.h"

namespace moemamba::definition {  // letters: B sequences, L length, T = B L, D channels, W width

// All vectors row by row as in kernels/conv.h; initial [B, W - 1, D] holds zeros where there is
// none.
struct ConvInput {
  size_t B, L, D, W;
  std::vector<double> x, weight, bias, initial, starts;

  explicit ConvInput(const auto& op)
      : B(size_t(op.sequences)),
        L(size_t(op.x.rows()) / B),
        D(size_t(op.x.cols())),
        W(size_t(op.weight.cols())),
        x(to_doubles(op.x)),
        weight(to_doubles(op.weight)),
        bias(to_doubles(op.bias)),
        initial(op.initial ? to_doubles(op.initial) : std::vector<double>(B * (W - 1) * D)),
        starts(op.starts ? to_doubles(op.starts) : std::vector<double>(B * L)) {}

  // Where the input of channel d, `back` tokens before token t of sequence s, lies: an index into
  // x, or x.size() + an index into initial, or -1 if a document start lies between.
  int64_t place(size_t s, size_t t, size_t back, size_t d) const {
    for (size_t i = 0; i < back; ++i)
      if (i <= t && t - i < L && starts[s * L + t - i] != 0) return -1;
    if (t >= back) return int64_t((s * L + t - back) * D + d);
    return int64_t(x.size() + (s * (W - 1) + W - 1 + t - back) * D + d);
  }
  double at(int64_t place) const {
    if (place < 0) return 0;
    return size_t(place) < x.size() ? x[size_t(place)] : initial[size_t(place) - x.size()];
  }
};

struct ConvResult {
  std::vector<double> p, y, final;  // before and after SiLU; [B, W - 1, D]
};

inline ConvResult conv_forward(const ConvInput& in) {
  ConvResult result;
  for (size_t s = 0; s < in.B; ++s) {
    for (size_t t = 0; t < in.L; ++t)
      for (size_t d = 0; d < in.D; ++d) {
        double p = in.bias[d];
        for (size_t w = 0; w < in.W; ++w)
          p += in.weight[d * in.W + w] * in.at(in.place(s, t, in.W - 1 - w, d));
        result.p.push_back(p);
        result.y.push_back(silu(p));
      }
    for (size_t r = 0; r + 1 < in.W; ++r)
      for (size_t d = 0; d < in.D; ++d)
        result.final.push_back(in.at(in.place(s, in.L, in.W - 1 - r, d)));
  }
  return result;
}

struct ConvGradient {
  std::vector<double> dx, dweight, dbias, dinitial;
};

// Of sum dy y + sum dfinal final; dfinal may be empty.
inline ConvGradient conv_backward(const ConvInput& in, const std::vector<double>& dy,
                                  const std::vector<double>& dfinal) {
  const ConvResult result = conv_forward(in);
  ConvGradient g{std::vector<double>(in.x.size()), std::vector<double>(in.weight.size()),
                 std::vector<double>(in.D), std::vector<double>(in.initial.size())};
  const auto add = [&](int64_t place, double value) {
    if (place < 0) return;
    (size_t(place) < in.x.size() ? g.dx[size_t(place)] : g.dinitial[size_t(place) - in.x.size()]) +=
        value;
  };
  for (size_t s = 0; s < in.B; ++s)
    for (size_t d = 0; d < in.D; ++d) {
      for (size_t t = 0; t < in.L; ++t) {
        const size_t i = (s * in.L + t) * in.D + d;
        const double dp = dy[i] * silu_slope(result.p[i]);
        for (size_t w = 0; w < in.W; ++w) {
          const int64_t place = in.place(s, t, in.W - 1 - w, d);
          add(place, dp * in.weight[d * in.W + w]);
          g.dweight[d * in.W + w] += dp * in.at(place);
        }
        g.dbias[d] += dp;
      }
      for (size_t r = 0; r + 1 < in.W && !dfinal.empty(); ++r)
        add(in.place(s, in.L, in.W - 1 - r, d), dfinal[(s * (in.W - 1) + r) * in.D + d]);
    }
  return g;
}

}  // namespace moemamba::definition
