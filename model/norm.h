#pragma once
#include "kernels/norm.h"
#include "model/config.h"
#include "model/layer.h"
#include "model/parameters.h"

namespace moemamba {  // letters: T tokens, D width

// The pre-norm of a sub-layer, fused with the residual add before it: s = x + residual,
// y = norm(s). Not a Layer: it has two inputs and two outputs.
struct Norm {
  NormKind kind = NormKind::layer;
  float eps = 1e-5f;
  const Parameter* weight = nullptr;  // [D]
  const Parameter* bias = nullptr;    // [D]; LayerNorm only

  struct Saved {
    Tensor s, mean, rstd;
  };
  static Norm make(ParameterStore& store, const std::string& name, const ModelSizes& sizes);
  // residual may be empty; the sum is written over it. Returns y; saved.s is the residual stream.
  Tensor forward(Step& step, Tensor x, Tensor residual, Saved& saved) const;
  // dx [T, D] = gradient of s through the norm (+ dsum: what reaches s beside it, optional). dx may
  // be dsum or dy.
  struct Gradient {
    Tensor dy, dsum, dx;
  };
  void backward(Step& step, const Gradient& g, const Saved& saved) const;
};

}  // namespace moemamba
