#pragma once
#include <cmath>
#include <vector>

#include "kernels/norm.h"

namespace moemamba::definition {  // letters: T tokens, D model width

struct NormResult {
  std::vector<double> y, mean, rstd;  // [T, D], [T], [T]; mean is 0 for the RMS norm
};

// weight and bias [D]; s [T, D], the sum of input and residual. bias is empty for the RMS norm.
inline NormResult norm_forward(NormKind kind, const std::vector<double>& s,
                               const std::vector<double>& weight, const std::vector<double>& bias,
                               double eps) {
  const size_t D = weight.size();
  NormResult result;
  for (size_t start = 0; start < s.size(); start += D) {
    double mean = 0, spread = 0;
    for (size_t d = 0; d < D && kind == NormKind::layer; ++d) mean += s[start + d] / double(D);
    for (size_t d = 0; d < D; ++d)
      spread += (s[start + d] - mean) * (s[start + d] - mean) / double(D);
    const double rstd = 1 / std::sqrt(spread + eps);
    for (size_t d = 0; d < D; ++d)
      result.y.push_back((s[start + d] - mean) * rstd * weight[d] + (bias.empty() ? 0 : bias[d]));
    result.mean.push_back(mean);
    result.rstd.push_back(rstd);
  }
  return result;
}

struct NormGradient {
  std::vector<double> ds, dweight, dbias;
};

// Of the sum of dy * y.
inline NormGradient norm_backward(NormKind kind, const std::vector<double>& dy,
                                  const std::vector<double>& s, const std::vector<double>& weight,
                                  double eps) {
  const size_t D = weight.size();
  const NormResult forward = norm_forward(kind, s, weight, {}, eps);
  NormGradient g{std::vector<double>(s.size()), std::vector<double>(D), std::vector<double>(D)};
  for (size_t t = 0; t < forward.rstd.size(); ++t) {
    const double mean = forward.mean[t], rstd = forward.rstd[t];
    double total = 0, projected = 0;
    for (size_t d = 0; d < D; ++d) {
      const double n = (s[t * D + d] - mean) * rstd;
      total += dy[t * D + d] * weight[d] / double(D);
      projected += dy[t * D + d] * weight[d] * n / double(D);
      g.dweight[d] += dy[t * D + d] * n;
      g.dbias[d] += dy[t * D + d];
    }
    if (kind == NormKind::rms) total = 0;
    for (size_t d = 0; d < D; ++d) {
      const double n = (s[t * D + d] - mean) * rstd;
      g.ds[t * D + d] = rstd * (dy[t * D + d] * weight[d] - total - n * projected);
    }
  }
  return g;
}

}  // namespace moemamba::definition
