#pragma once
#include "model/router.h"

namespace moemamba {
// letters: T tokens, Din and Dout widths, E experts, E' experts of this rank, K per token, F hidden
// width, S = T K rows of this rank, C rows of one exchange chunk

// Networks of which a token visits those that a router chose; they are spread over the expert
// group. The exchange's first chunk keeps what backward needs; further chunks keep nothing and are
// dispatched and computed again (house.md, decision 5).
struct Experts {
  FeedForwardKind kind;
  bool linear = false;            // one matrix, `up`; else feed-forward networks without biases
  bool weighted = true;           // y_t = sum_k weight[t, k] expert(x_t), else without the weights
  const Parameter* up = nullptr;  // [E', F, Din]; linear: [E', Dout, Din]
  const Parameter* gate = nullptr;  // [E', F, Din]; SwiGLU only
  const Parameter* down = nullptr;  // [E', Dout, F]; none where linear

  // The rows of one chunk on their way through this rank's experts.
  struct Chunk {
    Rows x;           // [C, Din]
    Tensor gate, up;  // [C, F] before the activation
    Tensor hidden;    // [C, F]
  };
  struct Saved {
    Tensor x;  // [T, Din]
    ExpertExchange::Plan plan;
    Chunk first;
    Tensor returned;  // the experts' outputs: [S, Dout], or [C, Dout] where rows stay
  };
  struct Form {
    FeedForwardKind kind;
    int64_t in, hidden, out;
    int64_t local;  // E'
  };
  static Experts make(ParameterStore& store, const std::string& name, const ModelSizes& sizes,
                      const Form& form);
  static Experts make_linear(ParameterStore& store, const std::string& name,
                             const ModelSizes& sizes, const Form& form, bool weighted);

  Tensor forward(Step& step, Tensor x, const Router::Saved& routing, Saved& saved) const;
  struct Gradient {
    Tensor dy;       // [T, Dout] read
    Tensor dx;       // [T, Din] written, or added to
    Tensor dweight;  // [T, K] written where weighted
    bool add = false;
  };
  void backward(Step& step, const Gradient& g, const Router::Saved& routing,
                const Saved& saved) const;

 private:
  int64_t in() const { return up->shape[2]; }
  int64_t out() const { return (linear ? up : down)->shape[1]; }
  // relu, and its gradient, are taken with the products beside them; relu'(x) can be told from
  // relu(x), so that what goes in need not be kept beside what comes out.
  bool with_product() const {
    return !linear && !kind.gated && kind.activation == Activation::relu;
  }
  Chunk take_chunk(Step& step) const;
  Tensor hidden_rows(Step& step, const Chunk& chunk) const;
  void chunk_forward(Step& step, const Chunk& chunk, Tensor out) const;
  void chunk_backward(Step& step, const Chunk& chunk, Tensor dy, Tensor dx, bool accumulate) const;
  void hidden_backward(Step& step, const Chunk& chunk, Tensor dhidden, Tensor dx,
                       bool accumulate) const;
  void return_gradients(Step& step, const Gradient& g, const Router::Saved& routing,
                        const Saved& saved) const;
};

}  // namespace moemamba
