#pragma once
#include <optional>

#include "model/mamba.h"
#include "model/moe.h"
#include "model/norm.h"

namespace moemamba {  // letters: T tokens = B x L, D width, V vocabulary

// One block of MoE-Mamba (arXiv 2401.04081): x += mamba(norm(x)); x += moe(norm(x)).
struct Block {
  Norm mamba_norm;
  Mamba mamba;
  std::optional<Norm> moe_norm;  // none in a model without experts
  std::optional<MoE> moe;

  struct Saved {
    Norm::Saved mamba_norm, moe_norm;
    Mamba::Saved mamba;
    MoE::Saved moe;
  };
};

// Embedding, blocks, (final norm), head. The residual stream is handed on as (stream, pending):
// the sum is formed inside the next norm.
class LanguageModel {
 public:
  struct Saved {
    std::vector<Block::Saved> blocks;
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

  // Zeroed states for `sequences` sequences, in order of the Mamba layers.
  std::vector<MambaState> take_states(Arena& arena, int64_t sequences) const;

 private:
  void block_backward(Step& step, const Block& block, Tensor dstream,
                      const Block::Saved& saved) const;
  void announce(Step& step, int block, GradientBuckets* ready) const;

  ModelSizes sizes_;
  ParameterStore& store_;
  const Parameter* embedding_;  // [V, D]
  std::vector<Block> blocks_;
  std::optional<Norm> final_norm_;
  const Parameter* head_;  // [V, D]
};

}  // namespace moemamba
