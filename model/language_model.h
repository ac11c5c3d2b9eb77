#pragma once
#include <optional>

#include "model/block.h"

namespace moemamba {  // letters: T tokens = B x L, D width, V vocabulary

// Embedding (and learned positions), blocks, (final norm), head. One block of MoE-Mamba (arXiv
// 2401.04081) is "mamba, moe": s += mamba(norm(s)); s += moe(norm(s)).
class LanguageModel {
 public:
  struct Saved {
    std::vector<std::vector<SubLayer::Saved>> blocks;
    Norm::Saved final_norm;
    Tensor x;        // [T, D] what the head reads
    Tensor dstream;  // [T, D] in training: gradient of x, written by loss()
  };

  // Declares all parameters in `store`, which the caller then allocates.
  LanguageModel(const ModelSizes& sizes, ParameterStore& store, const RankLayout& layout, int rank);
  const ModelSizes& sizes() const { return sizes_; }
  Saved make_saved() const;

  // ids [T] i32. Fills saved.x. weights: each block waits for its own (null: they are there).
  void forward(Step& step, const Tensor& ids, Saved& saved, GradientBuckets* weights) const;
  // loss [T] per token. training: also saved.dstream and the head's gradient, of scale * sum(loss).
  void loss(Step& step, const Tensor& targets, Tensor loss, float scale, bool training,
            Saved& saved) const;
  // The mirror image; ready: told of each bucket whose gradient is complete (null: not the last
  // micro-batch of the step).
  void backward(Step& step, const Tensor& ids, const Saved& saved, GradientBuckets* ready) const;
  // logits [rows, V] of some rows of x.
  void logits(Step& step, const Tensor& x, Tensor logits) const;
  // After a step's update: every router's bias, by the choices [routers, E] of all ranks.
  void balance_routers(Stream& stream, const std::vector<double>& counts) const;

  // Zeroed states for `sequences` sequences, in order of the Mamba layers.
  std::vector<MambaState> take_states(Stream& stream, Arena& arena, int64_t sequences) const;
  // Room for `slots` tokens of each sequence, in order of the attention layers.
  std::vector<Tensor> take_caches(Arena& arena, int64_t sequences, int64_t slots) const;

 private:
  Tensor embed(Step& step, const Tensor& ids) const;
  void embed_backward(Step& step, const Tensor& ids, Tensor dy) const;
  void announce(Step& step, int block, GradientBuckets* ready) const;

  ModelSizes sizes_;
  ParameterStore& store_;
  const Parameter* embedding_;            // [V, D]
  const Parameter* positions_ = nullptr;  // [L, D]
  std::vector<std::vector<SubLayer>> blocks_;
  std::optional<Norm> final_norm_;
  const Parameter* head_;  // [V, D]
};

}  // namespace moemamba
