#pragma once
#include "model/config.h"
#include "model/linear.h"

namespace moemamba {
// letters: T tokens, I inner width, N states, R dt rank, W conv width

// What every Mamba layer has between its projections (Gu & Dao 2023; mamba_ssm's slow path):
//   c = silu(conv(x));  [dt, B, C] = x_proj c;  y = scan(c, dt_proj dt, A, B, C, D) * silu(z)
// with RMSNorm on dt, B and C where the settings ask for it (Jamba).
struct SelectiveSsm {
  int index = 0;  // among the Mamba layers: which recurrent state is its own
  float norm_eps = 1e-5f;
  const Parameter* conv = nullptr;       // [I, W]
  const Parameter* conv_bias = nullptr;  // [I]
  const Parameter* x_proj = nullptr;     // [R + 2N, I]: dt, B, C
  const Parameter* dt_proj = nullptr;    // [I, R]
  const Parameter* dt_bias = nullptr;    // [I]
  const Parameter* a_log = nullptr;      // [I, N]
  const Parameter* skip = nullptr;       // [I]
  const Parameter* norms[3] = {};        // dt_norm [R], b_norm [N], c_norm [N]; or none

  struct Saved {
    Tensor x, z;     // [T, I] the inputs
    Tensor proj;     // [T, R + 2N]
    Tensor normed;   // [T, R + 2N]: proj, or its norms
    Tensor rstd[3];  // [T]
    Tensor states;   // kept by the scan
    Tensor y;        // [T, I] gated
  };
  static SelectiveSsm make(ParameterStore& store, const std::string& name, const ModelSizes& sizes,
                           int index);
  Tensor forward(Step& step, Tensor x, Tensor z, Saved& saved) const;
  struct Gradient {
    Tensor dy;  // [T, I] read
    Tensor dx;  // [T, I] written
    Tensor dz;  // [T, I] written
  };
  void backward(Step& step, const Gradient& g, const Saved& saved) const;

 private:
  Tensor part(Tensor proj, int which) const;  // of dt, B, C
  void norm_forward(Step& step, const Saved& saved) const;
  void norm_backward(Step& step, Tensor dproj, const Saved& saved) const;
  struct ScanGradient {
    Tensor c, dt, dy, dc, ddt, dproj, dz;  // c, dt: forward's
  };
  Tensor dt(Step& step, const Saved& saved) const;  // [T, I] before bias and softplus
  Tensor convolved(Step& step, const Saved& saved, Tensor final) const;  // [T, I]
  void scan_forward(Step& step, Tensor c, Tensor dt, const Saved& saved) const;
  void scan_backward(Step& step, const ScanGradient& g, const Saved& saved) const;
};

}  // namespace moemamba
