#pragma once
#include <cmath>

#include "kernels/attention.h"
#include "tests/support/cases.h"

namespace moemamba::definition {  // letters: B sequences, L length, T = B L, H heads, Hkv, dh

// All vectors row by row as in kernels/attention.h, without a cache.
struct AttentionInput {
  size_t B, L, H, Hkv, dh;
  std::vector<double> qkv, starts;

  explicit AttentionInput(const auto& op)
      : B(size_t(op.sequences)),
        L(size_t(op.qkv.rows()) / B),
        H(size_t(op.heads)),
        Hkv(size_t(op.kv_heads)),
        dh(size_t(op.qkv.cols()) / (H + 2 * Hkv)),
        qkv(to_doubles(op.qkv)),
        starts(op.starts ? to_doubles(op.starts) : std::vector<double>(B * L)) {}

  // Where the heads of a token begin in qkv.
  size_t query(size_t t, size_t head) const { return (t * (H + 2 * Hkv) + head) * dh; }
  size_t key(size_t t, size_t head) const { return query(t, H + head / (H / Hkv)); }
  size_t value(size_t t, size_t head) const { return query(t, H + Hkv + head / (H / Hkv)); }
  double scale() const { return 1 / std::sqrt(double(dh)); }
  // The first token that token t sees.
  size_t first(size_t t) const {
    size_t at = t;
    while (at % L != 0 && starts[at] == 0) --at;
    return at;
  }
  double dot(const std::vector<double>& a, size_t a_begin, const std::vector<double>& b,
             size_t b_begin) const {
    double sum = 0;
    for (size_t i = 0; i < dh; ++i) sum += a[a_begin + i] * b[b_begin + i];
    return sum;
  }
  double score(size_t t, size_t j, size_t head) const {
    return scale() * dot(qkv, query(t, head), qkv, key(j, head));
  }
};

struct AttentionResult {
  std::vector<double> y, lse;
};

inline AttentionResult attention_forward(const AttentionInput& in) {
  AttentionResult result{std::vector<double>(in.B * in.L * in.H * in.dh), {}};
  for (size_t t = 0; t < in.B * in.L; ++t)
    for (size_t head = 0; head < in.H; ++head) {
      double greatest = in.score(t, t, head), sum = 0;
      for (size_t j = in.first(t); j <= t; ++j) greatest = std::max(greatest, in.score(t, j, head));
      for (size_t j = in.first(t); j <= t; ++j) sum += std::exp(in.score(t, j, head) - greatest);
      const double lse = greatest + std::log(sum);
      result.lse.push_back(lse);
      for (size_t j = in.first(t); j <= t; ++j)
        for (size_t i = 0; i < in.dh; ++i)
          result.y[(t * in.H + head) * in.dh + i] +=
              std::exp(in.score(t, j, head) - lse) * in.qkv[in.value(j, head) + i];
    }
  return result;
}

// dqkv of sum dy y. With p the probabilities of a row: dp_j = dy . v_j, ds_j = p_j (dp_j - sum p
// dp).
inline std::vector<double> attention_backward(const AttentionInput& in,
                                              const std::vector<double>& dy) {
  const AttentionResult result = attention_forward(in);
  std::vector<double> g(in.qkv.size());
  for (size_t t = 0; t < in.B * in.L; ++t)
    for (size_t head = 0; head < in.H; ++head) {
      const size_t row = (t * in.H + head) * in.dh;
      const auto probability = [&](size_t j) {
        return std::exp(in.score(t, j, head) - result.lse[t * in.H + head]);
      };
      double mean = 0;
      for (size_t j = in.first(t); j <= t; ++j)
        mean += probability(j) * in.dot(dy, row, in.qkv, in.value(j, head));
      for (size_t j = in.first(t); j <= t; ++j) {
        const double p = probability(j);
        const double ds = p * (in.dot(dy, row, in.qkv, in.value(j, head)) - mean) * in.scale();
        for (size_t i = 0; i < in.dh; ++i) {
          g[in.value(j, head) + i] += p * dy[row + i];
          g[in.key(j, head) + i] += ds * in.qkv[in.query(t, head) + i];
          g[in.query(t, head) + i] += ds * in.qkv[in.key(j, head) + i];
        }
      }
    }
  return g;
}

}  // namespace moemamba::definition
