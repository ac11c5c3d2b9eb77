#pragma once
#include "model/config.h"
#include "model/layer.h"
#include "model/parameters.h"

namespace moemamba {
// letters: T tokens, D width of what it reads, E experts, K per token, G routing groups

// Decides which experts a token visits, and with what weights (kernels/routing.h).
struct Router {
  int index = 0;  // among the model's routers: whose facts are its own
  int64_t K = 1;
  bool sigmoid = false;
  double capacity_factor = 0;
  bool renormalise = false;
  float scale = 1;                    // on all weights
  const Parameter* weight = nullptr;  // [E, D]
  const Parameter* bias = nullptr;    // [E] a state, optional: balances the choices

  struct Saved {
    Tensor x;  // [T, D] what it read
    Tensor logits, probabilities, expert, weight, position, source, offsets, counts;
  };
  static Router make(ParameterStore& store, const std::string& name, const ModelSizes& sizes,
                     int64_t width, int index);
  int64_t experts() const { return weight->shape[0]; }
  void forward(Step& step, Tensor x, Saved& saved) const;
  // dweight [T, K]: gradient of saved.weight. dx [T, D] is added to.
  void backward(Step& step, Tensor dweight, Tensor dx, const Saved& saved) const;
  // After a step: the bias grows by `rate` where an expert of `counts` [E] lies below the mean and
  // falls where it lies above.
  void balance(Stream& stream, const double* counts, float rate) const;
};

}  // namespace moemamba
