#pragma once
#include "kernels/run.h"

namespace moemamba {  // letters: T tokens, V vocabulary, D width

// Head and cross-entropy without whole logits: logits = x weight', computed in fixed tiles of
// tokens that live in the stream's workspace only.
//   loss[t] = logsumexp(logits_t) - logits_t[targets[t]]   (0 where targets[t] = -1: not counted)
// With gradients (dx and dweight given): of scale * sum_t loss[t]. Logits and losses are f32, the
// logits' gradients of x's dtype, and so is x times a token's 1 / sum_v exp(logit) where that
// factor is taken out of them (Hopper). On a GPU a target that is no id gives a loss that is NaN.
struct HeadCrossEntropy {
  static constexpr auto name = "head_cross_entropy";
  Tensor x;        // [T, D] read, f32 or bf16
  Tensor weight;   // [V, D] read, dtype of x
  Tensor targets;  // [T] i32 read, -1 .. V - 1
  Tensor loss;     // [T] written, f32
  Tensor dx;       // [T, D] written, optional; dtype of x
  Tensor dweight;  // [V, D] written (or added to), f32, with dx
  float scale = 1;
  bool accumulate = false;
  static constexpr auto reads() {
    return std::tuple(&HeadCrossEntropy::x, &HeadCrossEntropy::weight, &HeadCrossEntropy::targets);
  }
  static constexpr auto writes() {
    return std::tuple(&HeadCrossEntropy::loss, &HeadCrossEntropy::dx, &HeadCrossEntropy::dweight);
  }
  void check() const;
};

void run_cpu(Stream&, const HeadCrossEntropy&);
void run_cuda(Stream&, const HeadCrossEntropy&);

}  // namespace moemamba
