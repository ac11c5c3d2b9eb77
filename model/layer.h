#pragma once
#include <concepts>
#include <vector>

#include "core/arena.h"
#include "parallel/expert_exchange.h"

namespace moemamba {  // letters: T tokens = B sequences x L, D model width, E experts

// What the routers did in a step, added up over routers and micro-batches where the stream works.
struct RoutingFacts {
  Tensor choices;  // [routers, E] f64, before dropping
  Tensor sums;     // [4] f64: balance and z over groups and routers, unweighted; rows beyond
                   // capacity; routers in which a logit was NaN
};

// The recurrent state of one Mamba layer between two calls.
struct MambaState {
  Tensor conv;  // [B, W - 1, I] the last inputs of the convolution
  Tensor scan;  // [B, I, N] h
};

// One micro-batch on its way through the layers: where work goes, where memory comes from.
struct Step {
  Stream& stream;
  Arena& arena;  // a stack: what forward saves stays until the micro-batch ends; rest in Frames
  ExpertExchange* exchange = nullptr;
  RoutingFacts* facts = nullptr;
  int64_t sequences = 1;  // B
  Tensor starts;          // [T] u8, optional: tokens that begin a document
  int64_t routing_groups = 1;
  bool accumulate = false;  // weight gradients are added: not the first micro-batch of a step
  float balance_scale = 0;  // of each group's balance loss in the step's loss
  float z_scale = 0;
  // Recurrent decoding: states before this call, and after it (other memory); else null.
  const std::vector<MambaState>* initial = nullptr;
  const std::vector<MambaState>* final = nullptr;
  // And of attention: keys and values of the `position` tokens before, those of this call behind
  // them; one for each attention layer, [B, slots, 2 Hkv dh].
  const std::vector<Tensor>* caches = nullptr;
  int64_t position = 0;
  Activity* activity = nullptr;  // told of the block at hand; null: nobody is
  bool dropless = false;  // whatever the model's capacity factor: no row is beyond any capacity

  // Takes a product for a weight's gradient. Operators are values: a later version may keep them
  // until an exchange is in flight; nothing reads a weight's gradient before the block ends.
  template <class Op>
  void weight_work(const Op& op) {
    run(stream, op);
  }
};

// A struct of parameters whose Saved names all that passes from forward to backward.
template <class L>
concept Layer = requires(const L layer, Step& step, Tensor x, typename L::Saved& saved,
                         const typename L::Saved& kept) {
  { layer.forward(step, x, saved) } -> std::same_as<Tensor>;
  { layer.backward(step, x, x, kept) } -> std::same_as<void>;
};

}  // namespace moemamba
