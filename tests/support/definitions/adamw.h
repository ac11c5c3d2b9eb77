#pragma once
#include <cmath>
#include <vector>

namespace moemamba::definition {

struct AdamWOptions {
  double lr, beta1, beta2, eps, decay;
};
struct AdamWState {
  std::vector<double> value, m, v;
};

// One step (counted from 1) of algorithm 2 of Loshchilov & Hutter (2019), as torch.optim.AdamW
// writes it: both moments corrected for their start at zero, decay times the learning rate.
inline void adamw(AdamWState& state, const std::vector<double>& gradient, const AdamWOptions& o,
                  double step) {
  for (size_t i = 0; i < gradient.size(); ++i) {
    const double g = gradient[i];
    double &m = state.m[i], &v = state.v[i];
    m = o.beta1 * m + (1 - o.beta1) * g;
    v = o.beta2 * v + (1 - o.beta2) * g * g;
    const double m_hat = m / (1 - std::pow(o.beta1, step));
    const double v_hat = v / (1 - std::pow(o.beta2, step));
    state.value[i] -= o.lr * (m_hat / (std::sqrt(v_hat) + o.eps) + o.decay * state.value[i]);
  }
}

inline double sum_of_squares(const std::vector<double>& x) {
  double sum = 0;
  for (double value : x) sum += value * value;
  return sum;
}

}  // namespace moemamba::definition
