#pragma once
#include "model/selective_ssm.h"

namespace moemamba {  // letters: T tokens, D width, I inner width

// The Mamba layer (Gu & Dao 2023) as MoE-Mamba used it (arXiv 2401.04081):
//   [x, z] = in_proj u;  y = out_proj ssm(x, z)
struct Mamba {
  Linear in;  // [2I, D]: x first, then z
  SelectiveSsm ssm;
  Linear out;  // [D, I]

  struct Saved {
    Tensor x;  // [T, D] the layer's input
    SelectiveSsm::Saved ssm;
  };
  static Mamba make(ParameterStore& store, const std::string& name, const ModelSizes& sizes,
                    int index);
  Tensor forward(Step& step, Tensor x, Saved& saved) const;
  // dx [T, D] written.
  void backward(Step& step, Tensor dy, Tensor dx, const Saved& saved) const;
};
static_assert(Layer<Mamba>);

}  // namespace moemamba
