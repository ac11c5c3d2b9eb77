#pragma once
#include "model/config.h"
#include "model/layer.h"
#include "model/parameters.h"

namespace moemamba {
// letters: T tokens, D width, I inner width, N states, R dt rank, W conv width

// The Mamba layer (Gu & Dao 2023) as MoE-Mamba used it (arXiv 2401.04081; mamba_ssm's slow path):
//   [x, z] = in x';  c = silu(conv(x));  [dt, B, C] = x_proj c';  dt = dt_proj dt'
//   y = out (scan(c, dt, A, B, C, D) * silu(z))'
struct Mamba {
  int index = 0;                         // among the Mamba layers: which recurrent state is its own
  const Parameter* in = nullptr;         // [2I, D]: x first, then z
  const Parameter* conv = nullptr;       // [I, W]
  const Parameter* conv_bias = nullptr;  // [I]
  const Parameter* x_proj = nullptr;     // [R + 2N, I]: dt, B, C
  const Parameter* dt_proj = nullptr;    // [I, R]
  const Parameter* dt_bias = nullptr;    // [I]
  const Parameter* a_log = nullptr;      // [I, N]
  const Parameter* skip = nullptr;       // [I]
  const Parameter* out = nullptr;        // [D, I]

  struct Saved {
    Tensor x;       // [T, D] the layer's input
    Tensor xz;      // [T, 2I]
    Tensor c;       // [T, I]
    Tensor proj;    // [T, R + 2N]
    Tensor dt;      // [T, I] before bias and softplus
    Tensor states;  // kept by the scan
    Tensor y;       // [T, I] gated
  };
  static Mamba make(ParameterStore& store, const std::string& name, const ModelSizes& sizes,
                    int index);
  Tensor forward(Step& step, Tensor x, Saved& saved) const;
  // dx [T, D] written.
  void backward(Step& step, Tensor dy, Tensor dx, const Saved& saved) const;

 private:
  void scan_backward(Step& step, Tensor dgated, Tensor dc, Tensor ddt, Tensor dproj, Tensor dz,
                     const Saved& saved) const;
};
static_assert(Layer<Mamba>);

}  // namespace moemamba
