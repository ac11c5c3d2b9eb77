#pragma once
#include <map>
#include <string>

#include "model/config.h"
#include "tests/support/definitions/conv.h"
#include "tests/support/definitions/cross_entropy.h"
#include "tests/support/definitions/embedding.h"
#include "tests/support/definitions/matmul.h"
#include "tests/support/definitions/norm.h"
#include "tests/support/definitions/routing.h"
#include "tests/support/definitions/scan.h"

namespace moemamba::definition {
// letters: B sequences, T tokens, D width, I inner width, N states, R dt rank, E experts, F hidden

// Layers and the whole model in double precision, put together from the operators' definitions.

// By the parameters' names; an expert tensor under its pattern,
// "blocks.0.moe.experts.{}.up.weight".
using Weights = std::map<std::string, std::vector<double>>;

// Looks like an operator's tensor to the definitions.
struct Matrix {
  int64_t columns = 1;
  std::vector<double> values;
  int64_t rows() const { return int64_t(values.size()) / columns; }
  int64_t cols() const { return columns; }
  explicit operator bool() const { return !values.empty(); }
};
inline const std::vector<double>& to_doubles(const Matrix& m) {
  return m.values;
}

inline Matrix columns(const std::vector<double>& all, int64_t width, int64_t begin, int64_t end) {
  Matrix part{.columns = end - begin, .values = {}};
  for (size_t row = 0; row < all.size(); row += size_t(width))
    part.values.insert(part.values.end(), all.begin() + int64_t(row) + begin,
                       all.begin() + int64_t(row) + end);
  return part;
}

inline std::vector<double> norm(const ModelSizes& s, const Weights& w, const std::string& name,
                                const std::vector<double>& x) {
  const std::vector<double> none;
  return norm_forward(s.norm, x, w.at(name + ".weight"),
                      s.norm == NormKind::layer ? w.at(name + ".bias") : none, s.norm_eps)
      .y;
}

// x [T, D]; starts [T] or empty.
inline std::vector<double> mamba(const ModelSizes& s, const Weights& w, const std::string& name,
                                 const std::vector<double>& x, const std::vector<double>& starts,
                                 int64_t sequences) {
  const int64_t T = int64_t(x.size()) / s.D, P = s.R + 2 * s.N;
  const auto linear = [&](const std::vector<double>& a, const char* weight, int64_t out,
                          int64_t in) {
    return matmul(a, w.at(name + weight), T, out, in, false, true);
  };
  const std::vector<double> xz = linear(x, ".in_proj.weight", 2 * s.I, s.D);
  struct {
    Matrix x, weight, bias, initial, starts;
    int64_t sequences;
  } const conv{columns(xz, 2 * s.I, 0, s.I),
               {s.W, w.at(name + ".conv1d.weight")},
               {1, w.at(name + ".conv1d.bias")},
               {},
               {1, starts},
               sequences};
  const std::vector<double> c = conv_forward(ConvInput(conv)).y;
  const std::vector<double> proj = linear(c, ".x_proj.weight", P, s.I);
  struct {
    Matrix u, dt, dt_bias, a_log, b, c, skip, z, initial, starts;
    int64_t sequences;
  } const scan{{s.I, c},
               {s.I, linear(columns(proj, P, 0, s.R).values, ".dt_proj.weight", s.I, s.R)},
               {1, w.at(name + ".dt_proj.bias")},
               {s.N, w.at(name + ".A_log")},
               columns(proj, P, s.R, s.R + s.N),
               columns(proj, P, s.R + s.N, P),
               {1, w.at(name + ".D")},
               columns(xz, 2 * s.I, s.I, 2 * s.I),
               {},
               {1, starts},
               sequences};
  return linear(scan_forward(ScanInput(scan)).y, ".out_proj.weight", s.D, s.I);
}

struct MoEResult {
  std::vector<double> y;
  double balance = 0, z = 0;  // sums over groups
};

// x [T, D], T / groups tokens in each routing group.
inline MoEResult moe(const ModelSizes& s, const Weights& w, const std::string& name,
                     const std::vector<double>& x, int64_t groups) {
  const int64_t T = int64_t(x.size()) / s.D;
  const auto experts = [&](const char* which) -> const std::vector<double>& {
    return w.at(name + ".experts.{}." + which + ".weight");
  };
  const RouteResult r = route({T, s.E, s.K, groups, s.capacity_factor, s.renormalise},
                              matmul(x, w.at(name + ".router.weight"), T, s.E, s.D, false, true));
  const std::vector<double> rows = permute(x, r.source, r.offsets.back(), s.D, s.K);
  std::vector<double> hidden = grouped_matmul(rows, experts("up"), r.offsets, s.F, s.D, true);
  if (s.expert.gated)
    hidden =
        swiglu_forward(grouped_matmul(rows, experts("gate"), r.offsets, s.F, s.D, true), hidden);
  else
    hidden = activation_forward(s.expert.activation, hidden);
  const auto out = grouped_matmul(hidden, experts("down"), r.offsets, s.D, s.F, true);
  MoEResult result{.y = unpermute(out, r.position, r.weight, s.D, s.K)};
  for (double value : r.balance) result.balance += value;
  for (double value : r.z) result.z += value;
  return result;
}

struct ModelInput {
  std::vector<double> ids, starts;  // [T]; starts may be empty
  std::vector<int64_t> targets;     // [T]
  int64_t sequences, groups;
  double loss_scale, balance_scale, z_scale;
};

inline void add_to(std::vector<double>& x, const std::vector<double>& y) {
  for (size_t i = 0; i < x.size(); ++i) x[i] += y[i];
}

inline double language_model_loss(const ModelSizes& s, const Weights& w, const ModelInput& in) {
  std::vector<double> x = embedding_forward(in.ids, w.at("embedding.weight"), size_t(s.D));
  double loss = 0;
  for (int64_t i = 0; i < s.blocks; ++i) {
    const std::string block = "blocks." + std::to_string(i);
    add_to(x, mamba(s, w, block + ".mamba", norm(s, w, block + ".mamba_norm", x), in.starts,
                    in.sequences));
    if (s.E == 0) continue;
    const MoEResult result =
        moe(s, w, block + ".moe", norm(s, w, block + ".moe_norm", x), in.groups);
    add_to(x, result.y);
    loss += in.balance_scale * result.balance + in.z_scale * result.z;
  }
  if (s.final_norm) x = norm(s, w, "final.norm", x);
  for (double token : head_cross_entropy(x, w.at("head.weight"), in.targets, s.V, s.D, 1).loss)
    loss += in.loss_scale * token;
  return loss;
}

}  // namespace moemamba::definition
