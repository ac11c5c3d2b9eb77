#pragma once
#include "kernels/pointwise.h"
#include "model/config.h"
#include "model/layer.h"
#include "model/parameters.h"

namespace moemamba {
// letters: T tokens, D width, E experts, E' experts of this rank, K per token, F hidden width,
// S = T K rows of this rank, C rows of one exchange chunk

// A mixture of experts in place of a feed-forward layer (Switch Transformer's token choice):
//   y_t = sum_k p(t, e_k) expert_{e_k}(x_t),  expert(x) = down act(up x')'   (no biases)
// Experts are spread over the expert group. The exchange's first chunk keeps what backward needs;
// further chunks keep nothing and are dispatched and computed again (house.md, decision 5).
struct MoE {
  int index = 0;  // among the MoE layers
  int64_t K = 1;
  float capacity_factor = 0;
  bool renormalise = false;
  bool gated = false;
  Activation activation = Activation::relu;
  const Parameter* router = nullptr;  // [E, D]
  const Parameter* up = nullptr;      // [E', F, D]
  const Parameter* gate = nullptr;    // [E', F, D]; SwiGLU only
  const Parameter* down = nullptr;    // [E', D, F]

  // The rows of one chunk on their way through this rank's experts.
  struct Chunk {
    Rows x;           // [C, D]
    Tensor gate, up;  // [C, F] before the activation
    Tensor hidden;    // [C, F]
  };
  struct Saved {
    Tensor x;  // [T, D] the layer's input
    Tensor logits, probabilities, expert, weight, position, source, offsets, counts;  // routing.h
    Chunk first;
    Tensor returned;  // [S, D] the experts' outputs
  };
  static MoE make(ParameterStore& store, const std::string& name, const ModelSizes& sizes,
                  int64_t local_experts, int index);
  Tensor forward(Step& step, Tensor x, Saved& saved) const;
  // dx [T, D] written.
  void backward(Step& step, Tensor dy, Tensor dx, const Saved& saved) const;

 private:
  void route(Step& step, Saved& saved) const;
  Chunk take_chunk(Step& step) const;
  void experts_forward(Step& step, const Chunk& chunk, Tensor out) const;
  // dy [C, D] in, overwritten by the gradient of chunk.x.
  void experts_backward(Step& step, const Chunk& chunk, Tensor dy, bool accumulate) const;
  void route_backward(Step& step, Tensor dweight, Tensor dx, const Saved& saved) const;
};
static_assert(Layer<MoE>);

}  // namespace moemamba
