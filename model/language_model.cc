#include "model/language_model.h"

#include <algorithm>
#include <cmath>

#include "kernels/cross_entropy.h"
#include "kernels/embedding.h"
#include "kernels/matmul.h"

namespace moemamba {

namespace {
// Blocks of the store, in forward order: embedding, blocks, (final norm), head.
constexpr int kEmbedding = 0;
int block_index(int64_t block) {
  return int(block) + 1;
}

void wait_for(Step& step, const ParameterStore& store, int block, GradientBuckets* weights) {
  if (!weights || step.stream.is_dry()) return;
  for (Axis axis : {Axis::data, Axis::expert_data})
    if (const int bucket = store.bucket_of_block(block, axis); bucket >= 0)
      weights->wait_weights(bucket, step.stream);
}
}  // namespace

LanguageModel::LanguageModel(const ModelSizes& sizes, ParameterStore& store,
                             const RankLayout& layout, int rank)
    : sizes_(sizes), store_(store) {
  using Kind = Initial::Kind;
  const double scale = sizes.init_scale;
  store.begin_block("embedding");
  // The paper's code takes 1 as the embedding's fan-in, so the cut at +-2 scale bites.
  embedding_ = store.add("weight", {sizes.V, sizes.D},
                         {Kind::truncated_normal, std::sqrt(scale), 2 * scale});
  const int64_t local = sizes.E ? layout.experts_of(layout.expert_coordinate(rank)) : 0;
  for (int64_t i = 0; i < sizes.blocks; ++i) {
    store.begin_block("blocks." + std::to_string(i));
    Block block;
    block.mamba_norm = Norm::make(store, "mamba_norm", sizes);
    block.mamba = Mamba::make(store, "mamba", sizes, int(i));
    if (sizes.E) {
      block.moe_norm = Norm::make(store, "moe_norm", sizes);
      block.moe = MoE::make(store, "moe", sizes, local, int(i));
    }
    blocks_.push_back(std::move(block));
  }
  if (sizes.final_norm) {
    store.begin_block("final");
    final_norm_ = Norm::make(store, "norm", sizes);
  }
  store.begin_block("head");
  head_ = store.add("weight", {sizes.V, sizes.D},
                    {Kind::truncated_normal, std::sqrt(scale / double(sizes.D)), 2 * scale});
}

LanguageModel::Saved LanguageModel::make_saved() const {
  Saved saved;
  saved.blocks.resize(blocks_.size());
  return saved;
}

void LanguageModel::forward(Step& step, const Tensor& ids, Saved& saved,
                            GradientBuckets* weights) const {
  const int64_t T = ids.rows() * ids.cols();
  wait_for(step, store_, kEmbedding, weights);
  Tensor stream = step.arena.take({T, sizes_.D}, DType::f32, "embedded tokens");
  run(step.stream, EmbeddingForward{.ids = ids, .table = embedding_->value, .y = stream});
  Tensor pending;
  for (size_t i = 0; i < blocks_.size(); ++i) {
    const Block& block = blocks_[i];
    Block::Saved& kept = saved.blocks[i];
    wait_for(step, store_, block_index(int64_t(i)), weights);
    Tensor y = block.mamba_norm.forward(step, stream, pending, kept.mamba_norm);
    stream = kept.mamba_norm.s;
    pending = block.mamba.forward(step, y, kept.mamba);
    if (!block.moe) continue;
    y = block.moe_norm->forward(step, stream, pending, kept.moe_norm);
    stream = kept.moe_norm.s;
    pending = block.moe->forward(step, y, kept.moe);
  }
  if (final_norm_) {
    wait_for(step, store_, block_index(int64_t(blocks_.size())), weights);
    saved.x = final_norm_->forward(step, stream, pending, saved.final_norm);
  } else {
    run(step.stream, Add{.a = stream, .b = pending, .out = pending});
    saved.x = pending;
  }
  wait_for(step, store_, store_.blocks() - 1, weights);
}

void LanguageModel::loss(Step& step, const Tensor& targets, Tensor loss, float scale, bool training,
                         Saved& saved) const {
  if (training)
    saved.dstream = step.arena.take(saved.x.shape, DType::f32, "gradient of the stream");
  run(step.stream, HeadCrossEntropy{.x = saved.x,
                                    .weight = head_->value,
                                    .targets = targets,
                                    .loss = loss,
                                    .dx = training ? saved.dstream : Tensor{},
                                    .dweight = training ? head_->gradient : Tensor{},
                                    .scale = scale,
                                    .accumulate = step.accumulate});
}

void LanguageModel::announce(Step& step, int block, GradientBuckets* ready) const {
  if (!ready || step.stream.is_dry()) return;
  for (Axis axis : {Axis::expert_data, Axis::data})
    if (const int bucket = store_.bucket_of_block(block, axis); bucket >= 0)
      ready->ready(bucket, step.stream);
}

void LanguageModel::block_backward(Step& step, const Block& block, Tensor dstream,
                                   const Block::Saved& saved) const {
  Frame frame(step.arena);
  Tensor dx = step.arena.take(dstream.shape, DType::f32, "gradient of a layer's input");
  if (block.moe) {
    block.moe->backward(step, dstream, dx, saved.moe);
    block.moe_norm->backward(step, dx, dstream, saved.moe_norm);
  }
  block.mamba.backward(step, dstream, dx, saved.mamba);
  block.mamba_norm.backward(step, dx, dstream, saved.mamba_norm);
}

void LanguageModel::backward(Step& step, const Tensor& ids, const Saved& saved,
                             GradientBuckets* ready) const {
  announce(step, store_.blocks() - 1, ready);
  Tensor dstream = saved.dstream;
  if (final_norm_) {
    Frame frame(step.arena);
    // The head's gradient is that of the norm's output; the stream has no other reader.
    Tensor dy = step.arena.take(dstream.shape, DType::f32, "gradient of the final norm");
    copy(step.stream, dstream, dy);
    fill_zero(step.stream, dstream);
    final_norm_->backward(step, dy, dstream, saved.final_norm);
    announce(step, block_index(int64_t(blocks_.size())), ready);
  }
  for (size_t i = blocks_.size(); i-- > 0;) {
    block_backward(step, blocks_[i], dstream, saved.blocks[i]);
    announce(step, block_index(int64_t(i)), ready);
  }
  run(step.stream, EmbeddingBackward{.ids = ids,
                                     .dy = dstream,
                                     .dtable = embedding_->gradient,
                                     .accumulate = step.accumulate});
  announce(step, kEmbedding, ready);
}

void LanguageModel::logits(Step& step, const Tensor& x, Tensor logits) const {
  run(step.stream, Matmul{.a = x, .b = head_->value, .out = logits, .b_transposed = true});
}

std::vector<MambaState> LanguageModel::take_states(Arena& arena, int64_t sequences) const {
  std::vector<MambaState> states;
  for (size_t i = 0; i < blocks_.size(); ++i) {
    // A convolution of width 1 has no past inputs.
    states.push_back({sizes_.W > 1 ? arena.take({sequences, sizes_.W - 1, sizes_.I}) : Tensor{},
                      arena.take({sequences, sizes_.I, sizes_.N})});
    for (Tensor t : {states.back().conv, states.back().scan})
      if (t && !arena.measures())
        for (int64_t r = 0; r < t.rows(); ++r) std::fill_n(t.row<float>(r), t.stride, 0.f);
  }
  return states;
}

}  // namespace moemamba
