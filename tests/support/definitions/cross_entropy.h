#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace moemamba::definition {  // letters: T tokens, V vocabulary, D width

struct HeadCrossEntropyResult {
  std::vector<double> loss;         // [T]
  std::vector<double> dx, dweight;  // [T, D], [V, D]: of scale * sum_t loss[t]
};

// logits = x weight'; loss[t] = logsumexp(logits_t) - logits_t[targets[t]], 0 for a target of -1.
inline HeadCrossEntropyResult head_cross_entropy(const std::vector<double>& x,
                                                 const std::vector<double>& weight,
                                                 const std::vector<int64_t>& targets, int64_t V,
                                                 int64_t D, double scale) {
  const int64_t T = int64_t(targets.size());
  HeadCrossEntropyResult result;
  result.loss.resize(T);
  result.dx.resize(T * D);
  result.dweight.resize(V * D);
  for (int64_t t = 0; t < T; ++t) {
    if (targets[t] < 0) continue;
    std::vector<double> logits(V);
    for (int64_t v = 0; v < V; ++v)
      for (int64_t d = 0; d < D; ++d) logits[v] += x[t * D + d] * weight[v * D + d];
    const double greatest = *std::max_element(logits.begin(), logits.end());
    double sum = 0;
    for (double logit : logits) sum += std::exp(logit - greatest);
    result.loss[t] = greatest + std::log(sum) - logits[targets[t]];
    for (int64_t v = 0; v < V; ++v) {
      const double dlogit =
          scale * (std::exp(logits[v] - greatest) / sum - (v == targets[t] ? 1 : 0));
      for (int64_t d = 0; d < D; ++d) {
        result.dx[t * D + d] += dlogit * weight[v * D + d];
        result.dweight[v * D + d] += dlogit * x[t * D + d];
      }
    }
  }
  return result;
}

}  // namespace moemamba::definition
