#pragma once
#include "model/layer.h"
#include "model/parameters.h"

namespace moemamba {  // letters: T rows, F columns out, D columns in

// y = x W' (+ bias).
struct Linear {
  const Parameter* weight = nullptr;  // [F, D]
  const Parameter* bias = nullptr;    // [F], optional

  struct Initials {
    Initial weight, bias;
  };
  // A bias where initials.bias is drawn from something: with_bias.
  static Linear make(ParameterStore& store, const std::string& name, Shape shape,
                     const Initials& initials, bool with_bias);
  int64_t width() const { return weight->shape[0]; }

  Tensor forward(Step& step, Tensor x, const char* who) const;
  void forward(Step& step, Tensor x, Tensor y) const;
  // x: what forward read. dx [T, D] written (or added to); empty: not wanted.
  struct Gradient {
    Tensor x, dy, dx;
    bool add = false;
  };
  void backward(Step& step, const Gradient& g) const;
};

}  // namespace moemamba
