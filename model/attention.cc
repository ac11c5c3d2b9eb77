#include "model/attention.h"

#include "kernels/attention.h"
#include "kernels/rope.h"
#include "model/first_values.h"

namespace moemamba {

Attention Attention::make(ParameterStore& store, const std::string& name, const ModelSizes& s,
                          int index) {
  const FirstValues first(s);
  const int64_t rows = (s.H + 2 * s.Hkv) * s.dh, inner = s.H * s.dh;
  Attention layer{.index = index,
                  .heads = s.H,
                  .kv_heads = s.Hkv,
                  .head_width = s.dh,
                  .rotary = s.positions == ModelConfig::ROPE,
                  .rope_base = s.rope_base,
                  .qkv = {},
                  .out = {}};
  layer.qkv = Linear::make(store, name + ".qkv_proj", {rows, s.D},
                           {first.reads(s.D), first.bias(s.D)}, s.attention_bias);
  layer.out = Linear::make(store, name + ".out_proj", {s.D, inner},
                           {first.writes(inner), first.bias(inner)}, s.attention_bias);
  return layer;
}

// Queries and keys lie side by side: one call turns both.
void Attention::turn(Step& step, Tensor qkv, bool inverse) const {
  if (!rotary) return;
  const Tensor turned = qkv.column_range(0, (heads + kv_heads) * head_width);
  run(step.stream, Rope{.x = turned,
                        .starts = step.starts,
                        .y = turned,
                        .sequences = step.sequences,
                        .head_width = head_width,
                        .first_position = step.position,
                        .base = rope_base,
                        .inverse = inverse});
}

Tensor Attention::forward(Step& step, Tensor x, Saved& saved) const {
  const int64_t T = x.rows();
  saved.x = x;
  saved.qkv = qkv.forward(step, x, "attention queries, keys and values");
  turn(step, saved.qkv, false);
  saved.y = step.arena.take({T, heads * head_width}, x.dtype, "attention heads");
  saved.lse = step.arena.take({T, heads}, DType::f32, "attention log-sum-exp");
  run(step.stream, AttentionForward{.qkv = saved.qkv,
                                    .starts = step.starts,
                                    .y = saved.y,
                                    .lse = saved.lse,
                                    .cache = step.caches ? (*step.caches)[size_t(index)] : Tensor{},
                                    .first = {},
                                    .sequences = step.sequences,
                                    .heads = heads,
                                    .kv_heads = kv_heads,
                                    .filled = step.caches ? step.position : 0});
  return out.forward(step, saved.y, "attention output");
}

void Attention::backward(Step& step, Tensor dy, Tensor dx, const Saved& saved) const {
  Frame frame(step.arena);
  Tensor dheads = step.arena.take(saved.y.shape, dy.dtype, "gradient of attention heads");
  Tensor dqkv = step.arena.take(saved.qkv.shape, dy.dtype, "gradient of queries, keys and values");
  out.backward(step, {.x = saved.y, .dy = dy, .dx = dheads});
  run(step.stream, AttentionBackward{.qkv = saved.qkv,
                                     .starts = step.starts,
                                     .y = saved.y,
                                     .lse = saved.lse,
                                     .dy = dheads,
                                     .dqkv = dqkv,
                                     .sequences = step.sequences,
                                     .heads = heads,
                                     .kv_heads = kv_heads});
  turn(step, dqkv, true);
  qkv.backward(step, {.x = saved.x, .dy = dqkv, .dx = dx});
}

}  // namespace moemamba
