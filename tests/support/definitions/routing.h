#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

namespace moemamba::definition {
// letters: T tokens, E experts, K experts per token, D width, G routing groups

struct RouteShape {
  int64_t T, E, K, G = 1;
  double capacity_factor = 0;
  bool renormalise = false, sigmoid = false;
  double scale = 1;
  std::vector<double> bias = {};  // [E], or empty: choices are made on the logits
};

struct RouteResult {
  std::vector<double> probabilities, weight, balance, z;           // [T, E], [T, K], [G], [G]
  std::vector<int64_t> expert, position, source, offsets, counts;  // as in kernels/routing.h
};

inline std::vector<double> softmax(const double* logits, int64_t E) {
  const double greatest = *std::max_element(logits, logits + E);
  std::vector<double> p(E);
  for (int64_t e = 0; e < E; ++e) p[e] = std::exp(logits[e] - greatest);
  const double sum = std::accumulate(p.begin(), p.end(), 0.0);
  for (double& value : p) value /= sum;
  return p;
}

inline std::vector<double> sigmoid(const double* logits, int64_t E) {
  std::vector<double> p(E);
  for (int64_t e = 0; e < E; ++e) p[e] = 1 / (1 + std::exp(-logits[e]));
  return p;
}

inline double logsumexp(const double* logits, int64_t E) {
  const double greatest = *std::max_element(logits, logits + E);
  double sum = 0;
  for (int64_t e = 0; e < E; ++e) sum += std::exp(logits[e] - greatest);
  return greatest + std::log(sum);
}

// The K greatest values, ties to the lower id.
inline std::vector<int64_t> top_k(const std::vector<double>& values, int64_t K) {
  std::vector<int64_t> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return values[a] > values[b]; });
  order.resize(K);
  return order;
}

// A token's experts, of its logits and its scores p.
inline std::vector<int64_t> choices(const RouteShape& s, const double* logits,
                                    const std::vector<double>& p) {
  if (s.bias.empty()) return top_k({logits, logits + s.E}, s.K);
  std::vector<double> values = p;
  for (int64_t e = 0; e < s.E; ++e) values[e] += s.bias[e];
  return top_k(values, s.K);
}

// The sum that makes a token's scores shares q, whose mean the balance loss takes.
inline double share_total(const RouteShape& s, const double* p) {
  return s.sigmoid ? std::accumulate(p, p + s.E, 0.0) : 1;
}

// Numbers the kept choices by (expert, token, k); kept[t K + k] says which these are.
inline void sort_by_expert(const RouteShape& s, const std::vector<bool>& kept, RouteResult& r) {
  r.offsets.push_back(0);
  for (int64_t e = 0; e < s.E; ++e) {
    for (int64_t i = 0; i < s.T * s.K; ++i) {
      if (!kept[i] || r.expert[i] != e) continue;
      r.position[i] = int64_t(r.source.size());
      r.source.push_back(i);
    }
    r.offsets.push_back(int64_t(r.source.size()));
  }
  r.source.resize(s.T * s.K, -1);
}

inline RouteResult route(const RouteShape& s, const std::vector<double>& logits) {
  RouteResult r;
  const int64_t tokens = s.T / s.G;
  // 1e-9: factors are meant as decimals, and 1.15 * 100 is a little less than 115
  const int64_t capacity = int64_t(std::floor(s.capacity_factor * tokens * s.K / s.E + 1e-9));
  std::vector<bool> kept;
  r.counts.resize(s.G * s.E);
  r.balance.resize(s.G);
  r.z.resize(s.G);
  for (int64_t t = 0; t < s.T; ++t) {
    const int64_t g = t / tokens;
    const double* row = &logits[t * s.E];
    const std::vector<double> p = s.sigmoid ? sigmoid(row, s.E) : softmax(row, s.E);
    r.probabilities.insert(r.probabilities.end(), p.begin(), p.end());
    r.z[g] += std::pow(logsumexp(row, s.E), 2) / double(tokens);
    double total = 0;
    const std::vector<int64_t> chosen = choices(s, row, p);
    for (int64_t e : chosen) total += p[e];
    for (int64_t e : chosen) {
      const bool fits = s.capacity_factor == 0 || r.counts[g * s.E + e] < capacity;
      kept.push_back(fits);
      ++r.counts[g * s.E + e];
      r.expert.push_back(e);
      r.position.push_back(-1);
      r.weight.push_back(fits ? s.scale * p[e] / (s.renormalise ? total : 1) : 0);
    }
  }
  for (int64_t t = 0; t < s.T; ++t) {
    const double* p = &r.probabilities[t * s.E];
    const int64_t g = t / tokens;
    for (int64_t e = 0; e < s.E; ++e)
      r.balance[g] += double(s.E) * p[e] / share_total(s, p) / double(tokens) *
                      double(r.counts[g * s.E + e]) / double(tokens * s.K);
  }
  sort_by_expert(s, kept, r);
  return r;
}

// Adds to dp [E] what reaches the scores p of token t through its weights.
inline void weight_backward(const RouteShape& s, const RouteResult& r, const double* p, int64_t t,
                            const std::vector<double>& dweight, std::vector<double>& dp) {
  double total = 0, along = 0;
  for (int64_t i = t * s.K; i < (t + 1) * s.K; ++i) {
    total += p[r.expert[i]];
    if (r.position[i] >= 0) along += s.scale * dweight[i] * p[r.expert[i]];
  }
  for (int64_t i = t * s.K; i < (t + 1) * s.K; ++i) {
    const double dw = r.position[i] >= 0 ? s.scale * dweight[i] : 0;
    dp[r.expert[i]] += s.renormalise ? dw / total - along / (total * total) : dw;
  }
}

// The same through its shares q; `factor` is what balance_scale and the means make of a count.
inline void balance_backward(const RouteShape& s, const double* p, const int64_t* counts,
                             double factor, std::vector<double>& dp) {
  const double total = share_total(s, p);
  double mean = 0;  // sum_e q_e dq_e, felt by p where the shares are taken
  for (int64_t e = 0; e < s.E && s.sigmoid; ++e) mean += p[e] / total * factor * double(counts[e]);
  for (int64_t e = 0; e < s.E; ++e) dp[e] += (factor * double(counts[e]) - mean) / total;
}

// dlogits of sum(dweight * weight) + balance_scale sum(balance) + z_scale sum(z).
inline std::vector<double> route_backward(const RouteShape& s, const std::vector<double>& logits,
                                          const RouteResult& r, const std::vector<double>& dweight,
                                          double balance_scale, double z_scale) {
  std::vector<double> dlogits(s.T * s.E);
  const double tokens = double(s.T / s.G);
  const double factor = balance_scale * double(s.E) / (tokens * tokens * double(s.K));
  for (int64_t t = 0; t < s.T; ++t) {
    const double *p = &r.probabilities[t * s.E], *row = &logits[t * s.E];
    std::vector<double> dp(s.E);
    weight_backward(s, r, p, t, dweight, dp);
    balance_backward(s, p, &r.counts[t / (s.T / s.G) * s.E], factor, dp);
    double mean = 0;
    for (int64_t e = 0; e < s.E; ++e) mean += p[e] * dp[e];
    const double dlse = z_scale * 2 * logsumexp(row, s.E) / tokens;
    const std::vector<double> lse_slope = softmax(row, s.E);
    for (int64_t e = 0; e < s.E; ++e) {
      const double through = s.sigmoid ? dp[e] / (1 + std::exp(row[e])) : dp[e] - mean;
      dlogits[t * s.E + e] = p[e] * through + dlse * lse_slope[e];
    }
  }
  return dlogits;
}

// rows[r] = x[source[r] / K] for the first `count` rows.
inline std::vector<double> permute(const std::vector<double>& x, const std::vector<int64_t>& source,
                                   int64_t count, int64_t D, int64_t K) {
  std::vector<double> rows;
  for (int64_t r = 0; r < count; ++r)
    for (int64_t d = 0; d < D; ++d) rows.push_back(x[source[r] / K * D + d]);
  return rows;
}

// y[t] = sum_k weight[t, k] rows[position[t, k]]; with weights of 1 it is permute's gradient.
inline std::vector<double> unpermute(const std::vector<double>& rows,
                                     const std::vector<int64_t>& position,
                                     const std::vector<double>& weight, int64_t D, int64_t K) {
  std::vector<double> y(position.size() / size_t(K) * size_t(D));
  for (size_t i = 0; i < position.size(); ++i)
    for (int64_t d = 0; d < D && position[i] >= 0; ++d)
      y[i / K * D + d] += weight[i] * rows[position[i] * D + d];
  return y;
}

struct UnpermuteGradient {
  std::vector<double> drows, dweight;  // [R, D], [T, K]
};

// Of the sum of dy * y.
inline UnpermuteGradient unpermute_backward(const std::vector<double>& dy,
                                            const std::vector<double>& rows,
                                            const std::vector<int64_t>& position,
                                            const std::vector<double>& weight, int64_t D,
                                            int64_t K) {
  UnpermuteGradient gradient;
  gradient.drows.resize(rows.size());
  gradient.dweight.resize(position.size());
  for (size_t i = 0; i < position.size(); ++i)
    for (int64_t d = 0; d < D && position[i] >= 0; ++d) {
      gradient.drows[position[i] * D + d] = weight[i] * dy[i / K * D + d];
      gradient.dweight[i] += dy[i / K * D + d] * rows[position[i] * D + d];
    }
  return gradient;
}

}  // namespace moemamba::definition
