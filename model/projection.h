#pragma once
#include <optional>

#include "model/experts.h"
#include "model/linear.h"

namespace moemamba {  // letters: T tokens, Din and Dout widths, K experts per token

// A projection inside a Mamba layer: a matrix, or experts in its place, which a router of its own
// or one that several projections share chooses.
struct Projection {
  std::optional<Linear> plain;  // [Dout, Din]
  std::optional<Router> router;
  std::optional<Experts> experts;

  struct Saved {
    Tensor x;  // [T, Din]
    Router::Saved routing;
    Experts::Saved experts;
  };
  // shared: the decision of a router outside; null where the projection has its own or none.
  Tensor forward(Step& step, Tensor x, const Router::Saved* shared, Saved& saved) const;
  struct Gradient {
    Tensor dy, dx;   // [T, Dout] read, [T, Din] written or added to
    Tensor dweight;  // [T, K] written, with a shared router whose weights it uses
    bool add = false;
  };
  void backward(Step& step, const Gradient& g, const Router::Saved* shared,
                const Saved& saved) const;
};

}  // namespace moemamba
