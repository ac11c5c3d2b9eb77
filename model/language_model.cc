#include "model/language_model.h"

#include <algorithm>

#include "kernels/bias.h"
#include "kernels/cross_entropy.h"
#include "kernels/embedding.h"
#include "kernels/matmul.h"
#include "model/first_values.h"

namespace moemamba {

namespace {

// Blocks of the store, in forward order: embedding, blocks, (final norm), head.
constexpr int kEmbedding = 0;
int block_index(size_t block) {
  return int(block) + 1;
}

constexpr int64_t kNoBlock = -1;
void at_block(const Step& step, int64_t block) {
  if (step.activity) step.activity->at_layer(block);
}

void wait_for(Step& step, ParameterStore& store, int block, GradientBuckets* weights) {
  if (step.stream.is_dry()) return;
  for (Axis axis : {Axis::data, Axis::expert_data}) {
    const int bucket = store.bucket_of_block(block, axis);
    if (bucket < 0) continue;
    if (weights) weights->wait_weights(bucket, step.stream);
    store.refresh_compute(step.stream, bucket);
  }
}

}  // namespace

LanguageModel::LanguageModel(const ModelSizes& sizes, ParameterStore& store,
                             const RankLayout& layout, int rank)
    : sizes_(sizes), store_(store) {
  const FirstValues first(sizes);
  store.begin_block("embedding");
  embedding_ = store.add("weight", {sizes.V, sizes.D}, first.embedding());
  if (sizes.learned_positions > 0)
    positions_ =
        store.add("positions.weight", {sizes.learned_positions, sizes.D}, first.embedding());
  LayerCounts counts;
  for (int64_t i = 0; i < sizes.blocks; ++i) {
    store.begin_block("blocks." + std::to_string(i));
    std::vector<SubLayer>& block = blocks_.emplace_back();
    for (const SubLayerPlan& plan : sizes.block(i))
      block.push_back(SubLayer::make(store, sizes, plan, {layout, rank}, counts));
  }
  if (sizes.final_norm) {
    store.begin_block("final");
    final_norm_ = Norm::make(store, "norm", sizes);
  }
  store.begin_block("head");
  head_ = store.add("weight", {sizes.V, sizes.D}, first.reads(sizes.D));
}

LanguageModel::Saved LanguageModel::make_saved() const {
  Saved saved;
  for (const auto& block : blocks_) {
    auto& kept = saved.blocks.emplace_back();
    for (const SubLayer& sub : block) kept.push_back(sub.make_saved());
  }
  return saved;
}

Tensor LanguageModel::embed(Step& step, const Tensor& ids) const {
  Tensor x = step.arena.take({ids.elements(), sizes_.D}, sizes_.compute, "embedded tokens");
  run(step.stream, EmbeddingForward{.ids = ids, .table = embedding_->compute, .y = x});
  if (positions_)
    run(step.stream, AddPositions{.x = x,
                                  .table = positions_->compute,
                                  .y = x,
                                  .sequences = step.sequences,
                                  .first_position = step.position});
  return x;
}

void LanguageModel::forward(Step& step, const Tensor& ids, Saved& saved,
                            GradientBuckets* weights) const {
  wait_for(step, store_, kEmbedding, weights);
  SubLayer::Residual s{.stream = embed(step, ids), .pending = {}};
  for (size_t i = 0; i < blocks_.size(); ++i) {
    at_block(step, int64_t(i));
    wait_for(step, store_, block_index(i), weights);
    for (size_t j = 0; j < blocks_[i].size(); ++j)
      s = blocks_[i][j].forward(step, s, saved.blocks[i][j]);
  }
  at_block(step, kNoBlock);
  if (final_norm_) {
    wait_for(step, store_, block_index(blocks_.size()), weights);
    saved.x = final_norm_->forward(step, s.stream, s.pending, saved.final_norm);
  } else if (s.pending) {
    run(step.stream, Add{.a = s.stream, .b = s.pending, .out = s.pending});
    saved.x = s.pending;
  } else {
    saved.x = s.stream;
  }
  wait_for(step, store_, store_.blocks() - 1, weights);
}

void LanguageModel::loss(Step& step, const Tensor& targets, Tensor loss, float scale, bool training,
                         Saved& saved) const {
  if (training)
    saved.dstream = step.arena.take(saved.x.shape, saved.x.dtype, "gradient of the stream");
  run(step.stream, HeadCrossEntropy{.x = saved.x,
                                    .weight = head_->compute,
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

void LanguageModel::embed_backward(Step& step, const Tensor& ids, Tensor dy) const {
  if (positions_)
    run(step.stream, PositionsBackward{.dy = dy,
                                       .dtable = positions_->gradient,
                                       .sequences = step.sequences,
                                       .accumulate = step.accumulate});
  run(step.stream,
      EmbeddingBackward{
          .ids = ids, .dy = dy, .dtable = embedding_->gradient, .accumulate = step.accumulate});
}

void LanguageModel::backward(Step& step, const Tensor& ids, const Saved& saved,
                             GradientBuckets* ready) const {
  announce(step, store_.blocks() - 1, ready);
  const Tensor dstream = saved.dstream;
  if (final_norm_) {
    final_norm_->backward(step, {.dy = dstream, .dsum = {}, .dx = dstream}, saved.final_norm);
    announce(step, block_index(blocks_.size()), ready);
  }
  for (size_t i = blocks_.size(); i-- > 0;) {
    at_block(step, int64_t(i));
    for (size_t j = blocks_[i].size(); j-- > 0;)
      blocks_[i][j].backward(step, dstream, saved.blocks[i][j]);
    announce(step, block_index(i), ready);
  }
  at_block(step, kNoBlock);
  embed_backward(step, ids, dstream);
  announce(step, kEmbedding, ready);
}

void LanguageModel::logits(Step& step, const Tensor& x, Tensor logits) const {
  run(step.stream, Matmul{.a = x, .b = head_->compute, .out = logits, .b_transposed = true});
}

void LanguageModel::balance_routers(Stream& stream, const std::vector<double>& counts) const {
  if (sizes_.router_bias_rate == 0) return;
  const auto balance = [&](const Router& router) {
    router.balance(stream, counts.data() + router.index * sizes_.E, sizes_.router_bias_rate);
  };
  for (const auto& block : blocks_)
    for (const SubLayer& sub : block)
      for (const AnyLayer& layer : sub.layers) {
        if (const auto* moe = std::get_if<MoE>(&layer)) balance(moe->router);
        if (const auto* inner = std::get_if<InnerMoE>(&layer))
          for (const std::optional<Router>* router :
               {&inner->router, &inner->conv.router, &inner->gate.router, &inner->out.router})
            if (*router) balance(**router);
      }
}

std::vector<MambaState> LanguageModel::take_states(Stream& stream, Arena& arena,
                                                   int64_t sequences) const {
  std::vector<MambaState> states;
  const int64_t layers = sizes_.layers(LayerKind::mamba) + sizes_.layers(LayerKind::inner_moe);
  for (int64_t i = 0; i < layers; ++i) {
    // A convolution of width 1 has no past inputs.
    MambaState& state = states.emplace_back();
    if (sizes_.W > 1) state.conv = arena.take({sequences, sizes_.W - 1, sizes_.I}, sizes_.compute);
    state.scan = arena.take({sequences, sizes_.I, sizes_.N});
    if (arena.measures()) continue;
    if (state.conv) fill_zero(stream, state.conv);
    fill_zero(stream, state.scan);
  }
  return states;
}

std::vector<Tensor> LanguageModel::take_caches(Arena& arena, int64_t sequences,
                                               int64_t slots) const {
  std::vector<Tensor> caches;
  for (int64_t i = 0; i < sizes_.layers(LayerKind::attention); ++i)
    caches.push_back(
        arena.take({sequences, slots, 2 * sizes_.Hkv * sizes_.dh}, sizes_.compute,
                   "keys and values"));
  return caches;
}

}  // namespace moemamba
