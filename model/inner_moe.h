#pragma once
#include "model/projection.h"
#include "model/selective_ssm.h"

namespace moemamba {  // letters: T tokens, D width, I inner width

// A Mamba layer whose projections may consist of experts:
//   x = conv_proj u;  z = gate_proj u;  y = out_proj ssm(x, z)
// MoE-Mamba's Inner MoE (arXiv 2401.04081, section 4.4): every chosen projection is a mixture of
// ReLU bottlenecks with a router of its own, which reads what the projection reads. In Routing
// Mamba's manner (arXiv 2506.18145): linear experts, and one router, on the layer's input, decides
// for all of them; its weights enter once, at the output.
struct InnerMoE {
  std::optional<Router> router;  // shared by all projections
  Projection conv, gate, out;
  SelectiveSsm ssm;

  struct Saved {
    Router::Saved routing;
    Projection::Saved conv, gate, out;
    SelectiveSsm::Saved ssm;
  };
  // index: among the Mamba layers. next_router: counted on by as many as this layer has.
  static InnerMoE make(ParameterStore& store, const std::string& name, const ModelSizes& sizes,
                       int64_t local_experts, int index, int& next_router);
  Tensor forward(Step& step, Tensor x, Saved& saved) const;
  // dx [T, D] written.
  void backward(Step& step, Tensor dy, Tensor dx, const Saved& saved) const;
};
static_assert(Layer<InnerMoE>);

}  // namespace moemamba
