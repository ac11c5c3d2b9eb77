#pragma once
#include "model/config.h"
#include "model/parameters.h"

namespace moemamba {

// The distributions that new weights are drawn from, by model.init (docs/operators.md, "initial
// values"). fan_in: columns of the matrix.
struct FirstValues {
  ModelConfig::Initialisation recipe;
  double scale;           // model.init_scale
  double residual_depth;  // sub-layers that add to the residual stream

  explicit FirstValues(const ModelSizes& sizes);
  Initial embedding() const;
  // Matrices of attention, routers, feed-forward networks and the head that read the stream.
  Initial reads(int64_t fan_in) const;
  // Those that write to it. experts: of a mixture whose second matrix this is; the paper's code
  // counts them all into the fan-in.
  Initial writes(int64_t fan_in, int64_t experts = 1) const;
  Initial bias(int64_t fan_in) const;
  // PyTorch's linear layer, which Mamba's own matrices keep; writes: the one back to the stream.
  Initial linear(int64_t fan_in) const;
  Initial linear_writes(int64_t fan_in) const;

 private:
  Initial normal(double variance) const;
};

}  // namespace moemamba
