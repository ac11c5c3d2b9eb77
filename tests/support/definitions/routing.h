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
  bool renormalise = false;
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

inline double logsumexp(const double* logits, int64_t E) {
  const double greatest = *std::max_element(logits, logits + E);
  double sum = 0;
  for (int64_t e = 0; e < E; ++e) sum += std::exp(logits[e] - greatest);
  return greatest + std::log(sum);
}

// The K greatest logits, ties to the lower id.
inline std::vector<int64_t> top_k(const double* logits, int64_t E, int64_t K) {
  std::vector<int64_t> order(E);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return logits[a] > logits[b]; });
  order.resize(K);
  return order;
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
  const int64_t capacity = int64_t(std::floor(s.capacity_factor * tokens * s.K / s.E));
  std::vector<bool> kept;
  r.counts.resize(s.G * s.E);
  r.balance.resize(s.G);
  r.z.resize(s.G);
  for (int64_t t = 0; t < s.T; ++t) {
    const int64_t g = t / tokens;
    const std::vector<double> p = softmax(&logits[t * s.E], s.E);
    r.probabilities.insert(r.probabilities.end(), p.begin(), p.end());
    r.z[g] += std::pow(logsumexp(&logits[t * s.E], s.E), 2) / double(tokens);
    double total = 0;
    const std::vector<int64_t> chosen = top_k(&logits[t * s.E], s.E, s.K);
    for (int64_t e : chosen) total += p[e];
    for (int64_t e : chosen) {
      const bool fits = s.capacity_factor == 0 || r.counts[g * s.E + e] < capacity;
      kept.push_back(fits);
      ++r.counts[g * s.E + e];
      r.expert.push_back(e);
      r.position.push_back(-1);
      r.weight.push_back(fits ? p[e] / (s.renormalise ? total : 1) : 0);
    }
  }
  for (int64_t g = 0; g < s.G; ++g)
    for (int64_t t = g * tokens; t < (g + 1) * tokens; ++t)
      for (int64_t e = 0; e < s.E; ++e)
        r.balance[g] += double(s.E) * r.probabilities[t * s.E + e] / double(tokens) *
                        double(r.counts[g * s.E + e]) / double(tokens * s.K);
  sort_by_expert(s, kept, r);
  return r;
}

// dlogits of sum(dweight * weight) + balance_scale sum(balance) + z_scale sum(z).
inline std::vector<double> route_backward(const RouteShape& s, const std::vector<double>& logits,
                                          const RouteResult& r, const std::vector<double>& dweight,
                                          double balance_scale, double z_scale) {
  std::vector<double> dlogits(s.T * s.E);
  const double tokens = double(s.T / s.G);
  for (int64_t t = 0; t < s.T; ++t) {
    const double* p = &r.probabilities[t * s.E];
    const int64_t g = t / (s.T / s.G);
    std::vector<double> dp(s.E);
    for (int64_t e = 0; e < s.E; ++e)
      dp[e] = balance_scale * double(s.E) * double(r.counts[g * s.E + e]) /
              (tokens * tokens * double(s.K));
    double total = 0, along = 0;
    for (int64_t i = t * s.K; i < (t + 1) * s.K; ++i) {
      total += p[r.expert[i]];
      if (r.position[i] >= 0) along += dweight[i] * p[r.expert[i]];
    }
    for (int64_t i = t * s.K; i < (t + 1) * s.K; ++i) {
      const double dw = r.position[i] >= 0 ? dweight[i] : 0;
      dp[r.expert[i]] += s.renormalise ? dw / total - along / (total * total) : dw;
    }
    double mean = 0;
    for (int64_t e = 0; e < s.E; ++e) mean += p[e] * dp[e];
    const double dlse = z_scale * 2 * logsumexp(&logits[t * s.E], s.E) / tokens;
    for (int64_t e = 0; e < s.E; ++e) dlogits[t * s.E + e] = p[e] * (dp[e] - mean + dlse);
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
