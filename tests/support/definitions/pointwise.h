#pragma once
#include <cmath>
#include <vector>

#include "kernels/pointwise.h"

namespace moemamba::definition {

inline double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}
inline double silu(double x) {
  return x * sigmoid(x);
}
inline double silu_slope(double x) {
  return sigmoid(x) * (1 + x * (1 - sigmoid(x)));
}

inline double activation(Activation kind, double x) {
  switch (kind) {
    case Activation::relu:
      return x > 0 ? x : 0;
    case Activation::gelu:
      return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    case Activation::silu:
      return silu(x);
  }
  return 0;
}

inline double activation_slope(Activation kind, double x) {
  constexpr double kTwoPi = 6.283185307179586;
  switch (kind) {
    case Activation::relu:
      return x > 0 ? 1 : 0;
    case Activation::gelu:
      return 0.5 * std::erfc(-x / std::sqrt(2.0)) + x * std::exp(-x * x / 2) / std::sqrt(kTwoPi);
    case Activation::silu:
      return silu_slope(x);
  }
  return 0;
}

inline std::vector<double> activation_forward(Activation kind, const std::vector<double>& x) {
  std::vector<double> y;
  for (double value : x) y.push_back(activation(kind, value));
  return y;
}

inline std::vector<double> activation_backward(Activation kind, const std::vector<double>& x,
                                               const std::vector<double>& dy) {
  std::vector<double> dx;
  for (size_t i = 0; i < x.size(); ++i) dx.push_back(dy[i] * activation_slope(kind, x[i]));
  return dx;
}

inline std::vector<double> swiglu_forward(const std::vector<double>& gate,
                                          const std::vector<double>& up) {
  std::vector<double> y;
  for (size_t i = 0; i < gate.size(); ++i) y.push_back(silu(gate[i]) * up[i]);
  return y;
}

struct SwiGluGradient {
  std::vector<double> dgate, dup;
};
inline SwiGluGradient swiglu_backward(const std::vector<double>& gate,
                                      const std::vector<double>& up,
                                      const std::vector<double>& dy) {
  SwiGluGradient g;
  for (size_t i = 0; i < gate.size(); ++i) {
    g.dgate.push_back(dy[i] * up[i] * silu_slope(gate[i]));
    g.dup.push_back(dy[i] * silu(gate[i]));
  }
  return g;
}

}  // namespace moemamba::definition
