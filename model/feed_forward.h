#pragma once
#include "model/config.h"
#include "model/linear.h"

namespace moemamba {  // letters: T tokens, D width, F hidden width

// y = down act(up x), or down (silu(gate x) * (up x)).
struct FeedForward {
  FeedForwardKind kind;
  Linear up, gate, down;  // gate: SwiGLU only

  struct Saved {
    Tensor x;         // [T, D] the layer's input
    Tensor gate, up;  // [T, F] before the activation
    Tensor hidden;    // [T, F]
  };
  struct Form {
    FeedForwardKind kind;
    int64_t hidden;
    bool bias;
  };
  static FeedForward make(ParameterStore& store, const std::string& name, const ModelSizes& sizes,
                          const Form& form);
  Tensor forward(Step& step, Tensor x, Saved& saved) const;
  // dx [T, D] written.
  void backward(Step& step, Tensor dy, Tensor dx, const Saved& saved) const;
};
static_assert(Layer<FeedForward>);

}  // namespace moemamba
