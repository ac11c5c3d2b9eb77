#pragma once
#include "kernels/scan.h"
#include "tests/support/cases.h"
#include "tests/support/definitions/pointwise.h"

namespace moemamba::definition {  // letters: B sequences, L length, T = B L, D channels, N states

inline double softplus(double x) {
  return x > 20 ? x : std::log1p(std::exp(x));
}

// All vectors row by row as in kernels/scan.h; z is empty where there is no gate.
struct ScanInput {
  size_t B, L, D, N;
  std::vector<double> u, dt, dt_bias, a_log, b, c, skip, z, initial, starts;

  explicit ScanInput(const auto& op)
      : B(size_t(op.sequences)),
        L(size_t(op.u.rows()) / B),
        D(size_t(op.u.cols())),
        N(size_t(op.a_log.cols())),
        u(to_doubles(op.u)),
        dt(to_doubles(op.dt)),
        dt_bias(to_doubles(op.dt_bias)),
        a_log(to_doubles(op.a_log)),
        b(to_doubles(op.b)),
        c(to_doubles(op.c)),
        skip(to_doubles(op.skip)),
        z(op.z ? to_doubles(op.z) : std::vector<double>()),
        initial(op.initial ? to_doubles(op.initial) : std::vector<double>(B * D * N)),
        starts(op.starts ? to_doubles(op.starts) : std::vector<double>(B * L)) {}
};

struct ScanResult {
  std::vector<double> p, y, final;  // before and after the gate; [B, D, N]
  std::vector<double> h, before;    // [T, D, N]: the state after a token, and before it
};

inline ScanResult scan_forward(const ScanInput& in) {
  const size_t D = in.D, N = in.N;
  ScanResult result;
  result.final = in.initial;
  for (size_t t = 0; t < in.B * in.L; ++t)
    for (size_t d = 0; d < D; ++d) {
      const size_t i = t * D + d;
      const double delta = softplus(in.dt[i] + in.dt_bias[d]);
      double p = in.skip[d] * in.u[i];
      for (size_t n = 0; n < N; ++n) {
        double& h = result.final[(t / in.L * D + d) * N + n];
        if (in.starts[t] != 0) h = 0;
        result.before.push_back(h);
        h = std::exp(-delta * std::exp(in.a_log[d * N + n])) * h +
            delta * in.b[t * N + n] * in.u[i];
        result.h.push_back(h);
        p += in.c[t * N + n] * h;
      }
      result.p.push_back(p);
      result.y.push_back(in.z.empty() ? p : p * silu(in.z[i]));
    }
  return result;
}

struct ScanGradient {
  std::vector<double> du, ddt, db, dc, dz, da_log, ddt_bias, dskip, dinitial;
};

// Of sum dy y + sum dfinal final; dfinal may be empty.
inline ScanGradient scan_backward(const ScanInput& in, const std::vector<double>& dy,
                                  const std::vector<double>& dfinal) {
  const ScanResult result = scan_forward(in);
  const size_t D = in.D, N = in.N, T = in.B * in.L;
  ScanGradient g;
  for (auto* field : {&g.du, &g.ddt, &g.dz}) field->resize(T * D);
  for (auto* field : {&g.db, &g.dc}) field->resize(T * N);
  for (auto* field : {&g.ddt_bias, &g.dskip}) field->resize(D);
  g.da_log.resize(D * N);
  g.dinitial = dfinal.empty() ? std::vector<double>(in.B * D * N) : dfinal;
  for (size_t t = T; t-- > 0;)
    for (size_t d = 0; d < D; ++d) {
      const size_t i = t * D + d;
      const double x = in.dt[i] + in.dt_bias[d], delta = softplus(x), u = in.u[i];
      const double dp = in.z.empty() ? dy[i] : dy[i] * silu(in.z[i]);
      if (!in.z.empty()) g.dz[i] = dy[i] * result.p[i] * silu_slope(in.z[i]);
      g.du[i] = in.skip[d] * dp;
      g.dskip[d] += dp * u;
      double ddelta = 0;
      for (size_t n = 0; n < N; ++n) {
        const double rate = -std::exp(in.a_log[d * N + n]), a = std::exp(delta * rate);
        const double b = in.b[t * N + n], before = result.before[i * N + n];
        double& dh = g.dinitial[(t / in.L * D + d) * N + n];  // of the state after token t
        dh += in.c[t * N + n] * dp;
        g.dc[t * N + n] += dp * result.h[i * N + n];
        g.db[t * N + n] += dh * delta * u;
        g.du[i] += dh * delta * b;
        ddelta += dh * (b * u + rate * a * before);
        g.da_log[d * N + n] += dh * delta * rate * a * before;
        dh = in.starts[t] != 0 ? 0 : dh * a;
      }
      g.ddt[i] = ddelta * (x > 20 ? 1 : sigmoid(x));
      g.ddt_bias[d] += g.ddt[i];
    }
  return g;
}

}  // namespace moemamba::definition
