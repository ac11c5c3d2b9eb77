#include "model/feed_forward.h"

#include "model/first_values.h"

namespace moemamba {

FeedForward FeedForward::make(ParameterStore& store, const std::string& name,
                              const ModelSizes& sizes, const Form& form) {
  const FirstValues first(sizes);
  const int64_t D = sizes.D, F = form.hidden;
  FeedForward layer{.kind = form.kind, .up = {}, .gate = {}, .down = {}};
  const Linear::Initials in{first.reads(D), first.bias(D)};
  layer.up = Linear::make(store, name + ".up", {F, D}, in, form.bias);
  if (form.kind.gated) layer.gate = Linear::make(store, name + ".gate", {F, D}, in, form.bias);
  layer.down =
      Linear::make(store, name + ".down", {D, F}, {first.writes(F), first.bias(F)}, form.bias);
  return layer;
}

Tensor FeedForward::forward(Step& step, Tensor x, Saved& saved) const {
  saved.x = x;
  saved.up = up.forward(step, x, "feed-forward hidden rows");
  // relu'(x) can be told from relu(x): what goes in need not be kept beside what comes out.
  const bool in_place = !kind.gated && kind.activation == Activation::relu;
  saved.hidden = in_place ? saved.up
                          : step.arena.take(saved.up.shape, x.dtype, "feed-forward activations");
  if (kind.gated) {
    saved.gate = gate.forward(step, x, "feed-forward gate rows");
    run(step.stream,
        SwiGluForward{.gate = saved.gate, .up = saved.up, .rows = {}, .y = saved.hidden});
  } else {
    run(step.stream,
        ActivationForward{.x = saved.up, .rows = {}, .y = saved.hidden, .kind = kind.activation});
  }
  return down.forward(step, saved.hidden, "feed-forward output");
}

void FeedForward::backward(Step& step, Tensor dy, Tensor dx, const Saved& saved) const {
  Frame frame(step.arena);
  Tensor dhidden =
      step.arena.take(saved.hidden.shape, dy.dtype, "gradient of feed-forward activations");
  down.backward(step, {.x = saved.hidden, .dy = dy, .dx = dhidden});
  if (kind.gated) {
    Tensor dgate = step.arena.take(saved.hidden.shape, dy.dtype, "gradient of feed-forward gate");
    run(step.stream, SwiGluBackward{.gate = saved.gate,
                                    .up = saved.up,
                                    .dy = dhidden,
                                    .rows = {},
                                    .dgate = dgate,
                                    .dup = dhidden});
    gate.backward(step, {.x = saved.x, .dy = dgate, .dx = dx});
  } else {
    run(step.stream,
        ActivationBackward{
            .x = saved.up, .dy = dhidden, .rows = {}, .dx = dhidden, .kind = kind.activation});
  }
  up.backward(step, {.x = saved.x, .dy = dhidden, .dx = dx, .add = kind.gated});
}

}  // namespace moemamba
