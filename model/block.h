#pragma once
#include <variant>
#include <vector>

#include "model/attention.h"
#include "model/inner_moe.h"
#include "model/mamba.h"
#include "model/moe.h"
#include "model/norm.h"

namespace moemamba {  // letters: T tokens, D width

using AnyLayer = std::variant<Mamba, InnerMoE, Attention, FeedForward, MoE>;
using AnySaved =
    std::variant<Mamba::Saved, InnerMoE::Saved, Attention::Saved, FeedForward::Saved, MoE::Saved>;

// How many layers of a kind that carries an index were made so far.
struct LayerCounts {
  int mamba = 0, attention = 0, routers = 0;
};

// One step of the residual stream s, over one or more layers side by side:
//   before the layers (PRE):  s += sum of layer(norm(s))
//   after them (POST):        s = norm(s + sum of layer(s))
struct SubLayer {
  Norm norm;
  bool post = false;
  std::vector<AnyLayer> layers;

  struct Saved {
    Norm::Saved norm;
    std::vector<AnySaved> layers;
  };
  struct Place {
    const RankLayout& layout;
    int rank;
  };
  static SubLayer make(ParameterStore& store, const ModelSizes& sizes, const SubLayerPlan& plan,
                       const Place& place, LayerCounts& counts);
  Saved make_saved() const;

  // The stream on its way: its value is stream + pending, formed inside the next norm; pending may
  // be empty.
  struct Residual {
    Tensor stream, pending;
  };
  Residual forward(Step& step, Residual in, Saved& saved) const;
  // dstream [T, D]: gradient of the stream behind this sub-layer in, before it out.
  void backward(Step& step, Tensor dstream, const Saved& saved) const;

 private:
  Tensor layers_forward(Step& step, Tensor x, Saved& saved) const;
  void layers_backward(Step& step, Tensor dy, Tensor dx, const Saved& saved) const;
};

}  // namespace moemamba
