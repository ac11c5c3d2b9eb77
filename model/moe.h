#pragma once
#include <optional>

#include "model/experts.h"
#include "model/feed_forward.h"

namespace moemamba {  // letters: T tokens, D width, E experts, K per token

// A mixture of experts in place of a feed-forward layer (Switch Transformer's token choice), and
// an expert beside it that all tokens share:
//   y_t = sum_k weight(t, e_k) expert_{e_k}(x_t) (+ shared(x_t)),   expert(x) = down act(up x)
struct MoE {
  Router router;
  Experts experts;
  std::optional<FeedForward> shared;

  struct Saved {
    Router::Saved routing;
    Experts::Saved experts;
    FeedForward::Saved shared;
  };
  static MoE make(ParameterStore& store, const std::string& name, const ModelSizes& sizes,
                  int64_t local_experts, int router_index);
  Tensor forward(Step& step, Tensor x, Saved& saved) const;
  // dx [T, D] written.
  void backward(Step& step, Tensor dy, Tensor dx, const Saved& saved) const;
};
static_assert(Layer<MoE>);

}  // namespace moemamba
