#include "model/experts.h"

#include "kernels/matmul.h"
#include "kernels/routing.h"
#include "model/first_values.h"

namespace moemamba {

Experts Experts::make(ParameterStore& store, const std::string& name, const ModelSizes& s,
                      const Form& form) {
  const FirstValues first(s);
  Experts experts{.kind = form.kind};
  const Shape in{form.local, form.hidden, form.in};
  experts.up =
      store.add(name + ".experts.{}.up.weight", in, first.reads(form.in), Axis::expert_data);
  if (form.kind.gated)
    experts.gate =
        store.add(name + ".experts.{}.gate.weight", in, first.reads(form.in), Axis::expert_data);
  experts.down = store.add(name + ".experts.{}.down.weight", {form.local, form.out, form.hidden},
                           first.writes(form.hidden, s.E), Axis::expert_data);
  return experts;
}

Experts Experts::make_linear(ParameterStore& store, const std::string& name, const ModelSizes& s,
                             const Form& form, bool weighted) {
  const FirstValues first(s);  // those with weights are the ones back to the residual stream
  Experts experts{.kind = {}, .linear = true, .weighted = weighted};
  experts.up = store.add(name + ".experts.{}.weight", {form.local, form.out, form.in},
                         weighted ? first.linear_writes(form.in) : first.linear(form.in),
                         Axis::expert_data);
  return experts;
}

Experts::Chunk Experts::take_chunk(Step& step) const {
  const int64_t C = step.exchange->capacity(), local = up->shape[0], F = up->shape[1];
  const DType dtype = up->compute.dtype;
  Chunk chunk;
  chunk.x.values = step.arena.take({C, in()}, dtype, "exchange rows of experts");
  chunk.x.offsets = step.arena.take({local + 1}, DType::i32, "offsets of expert rows");
  if (linear) return chunk;
  chunk.up = step.arena.take({C, F}, dtype, "expert hidden rows");
  if (kind.gated) chunk.gate = step.arena.take({C, F}, dtype, "expert gate rows");
  chunk.hidden = with_product() ? chunk.up : step.arena.take({C, F}, dtype, "expert activations");
  return chunk;
}

// Fills chunk.hidden; returns what the last matrix reads.
Tensor Experts::hidden_rows(Step& step, const Chunk& chunk) const {
  if (linear) return chunk.x.values;
  const Tensor offsets = chunk.x.offsets, rows = grouped_rows(chunk.x.offsets);
  run(step.stream, GroupedMatmul{.a = chunk.x.values,
                                 .b = up->compute,
                                 .offsets = offsets,
                                 .out = chunk.up,
                                 .b_transposed = true,
                                 .relu = with_product()});
  if (kind.gated) {
    run(step.stream, GroupedMatmul{.a = chunk.x.values,
                                   .b = gate->compute,
                                   .offsets = offsets,
                                   .out = chunk.gate,
                                   .b_transposed = true});
    run(step.stream,
        SwiGluForward{.gate = chunk.gate, .up = chunk.up, .rows = rows, .y = chunk.hidden});
  } else if (!with_product()) {
    run(step.stream,
        ActivationForward{.x = chunk.up, .rows = rows, .y = chunk.hidden, .kind = kind.activation});
  }
  return chunk.hidden;
}

void Experts::chunk_forward(Step& step, const Chunk& chunk, Tensor out) const {
  run(step.stream, GroupedMatmul{.a = hidden_rows(step, chunk),
                                 .b = (linear ? up : down)->compute,
                                 .offsets = chunk.x.offsets,
                                 .out = out,
                                 .b_transposed = true});
}

Tensor Experts::forward(Step& step, Tensor x, const Router::Saved& routing, Saved& saved) const {
  const int64_t T = x.rows(), K = routing.expert.cols();
  ExpertExchange& exchange = *step.exchange;
  saved.x = x;
  exchange.plan(step.stream, routing.offsets);
  exchange.keep(saved.plan);
  saved.first = take_chunk(step);
  const int64_t C = exchange.capacity();
  const bool stay = exchange.rows_stay();  // in the one chunk, and in what it gives
  const auto take = [&](int64_t rows, int64_t width, const char* who) {
    return step.arena.take({rows, width}, x.dtype, who);
  };
  saved.returned = take(stay ? C : T * K, out(), "exchange rows returned");
  const Tensor returned = saved.returned.row_range(0, T * K);
  Tensor y = take(T, out(), "MoE output");
  {
    Frame frame(step.arena);
    const Tensor first = saved.first.x.values;
    Tensor rows = stay ? first.row_range(0, T * K) : take(T * K, in(), "exchange rows to send");
    Tensor staging = stay ? first : take(C, in(), "exchange staging");
    Tensor chunk_out = stay ? saved.returned : take(C, out(), "exchange outputs of experts");
    Tensor back = stay              ? saved.returned
                  : out() == in() ? staging
                                  : take(C, out(), "exchange staging");
    run(step.stream, Permute{.x = x,
                             .source = routing.source,
                             .offsets = routing.offsets,
                             .rows = rows,
                             .top_k = K});
    for (int64_t i = 0; i < exchange.chunks(); ++i) {
      Frame again(step.arena);
      const Chunk chunk = i == 0 ? saved.first : take_chunk(step);
      exchange.dispatch(step.stream, i, rows, chunk.x, staging);
      chunk_forward(step, chunk, chunk_out);
      exchange.combine(step.stream, i, {chunk_out, chunk.x.offsets}, returned, back);
    }
  }
  if (weighted)
    run(step.stream, Unpermute{.rows = returned,
                               .position = routing.position,
                               .weight = routing.weight,
                               .y = y});
  else  // the sum of a token's rows, which is what permute's gradient is
    run(step.stream,
        PermuteBackward{.drows = returned, .position = routing.position, .dx = y});
  return y;
}

// From the gradient of the activations (with_product(): of what goes into them) to that of rows.
void Experts::hidden_backward(Step& step, const Chunk& chunk, Tensor dhidden, Tensor dx,
                              bool accumulate) const {
  const Tensor offsets = chunk.x.offsets, x = chunk.x.values, rows = grouped_rows(chunk.x.offsets);
  Tensor dgate;
  if (kind.gated) {
    dgate = step.arena.take(chunk.hidden.shape, dhidden.dtype, "gradient of the gate");
    run(step.stream, SwiGluBackward{.gate = chunk.gate,
                                    .up = chunk.up,
                                    .dy = dhidden,
                                    .rows = rows,
                                    .dgate = dgate,
                                    .dup = dhidden});
    step.weight_work(GroupedOuter{
        .a = dgate, .b = x, .offsets = offsets, .out = gate->gradient, .accumulate = accumulate});
  } else if (!with_product()) {
    run(step.stream,
        ActivationBackward{
            .x = chunk.up, .dy = dhidden, .rows = rows, .dx = dhidden, .kind = kind.activation});
  }
  step.weight_work(GroupedOuter{
      .a = dhidden, .b = x, .offsets = offsets, .out = up->gradient, .accumulate = accumulate});
  run(step.stream, GroupedMatmul{.a = dhidden, .b = up->compute, .offsets = offsets, .out = dx});
  if (kind.gated) {
    Tensor more = step.arena.take(dx.shape, dx.dtype, "gradient through the gate");
    run(step.stream,
        GroupedMatmul{.a = dgate, .b = gate->compute, .offsets = offsets, .out = more});
    run(step.stream, Add{.a = dx, .b = more, .out = dx});
  }
}

// dy [C, Dout] -> dx [C, Din], and the gradients of the weights.
void Experts::chunk_backward(Step& step, const Chunk& chunk, Tensor dy, Tensor dx,
                             bool accumulate) const {
  const Tensor offsets = chunk.x.offsets;
  const Parameter& last = linear ? *up : *down;
  Frame frame(step.arena);
  Tensor dlast =
      linear ? dx : step.arena.take(chunk.hidden.shape, dy.dtype, "gradient of activations");
  run(step.stream, GroupedMatmul{.a = dy,
                                 .b = last.compute,
                                 .offsets = offsets,
                                 .out = dlast,
                                 .positive = with_product() ? chunk.hidden : Tensor()});
  step.weight_work(GroupedOuter{.a = dy,
                                .b = linear ? chunk.x.values : chunk.hidden,
                                .offsets = offsets,
                                .out = last.gradient,
                                .accumulate = accumulate});
  if (!linear) hidden_backward(step, chunk, dlast, dx, accumulate);
}

// The gradient of what the experts returned takes its place: that was its last use.
void Experts::return_gradients(Step& step, const Gradient& g, const Router::Saved& routing,
                               const Saved& saved) const {
  const Tensor returned = saved.returned.row_range(0, g.dy.rows() * routing.expert.cols());
  if (weighted)
    run(step.stream, UnpermuteBackward{.dy = g.dy,
                                       .rows = returned,
                                       .position = routing.position,
                                       .weight = routing.weight,
                                       .drows = returned,
                                       .dweight = g.dweight});
  else
    run(step.stream, Permute{.x = g.dy,
                             .source = routing.source,
                             .offsets = routing.offsets,
                             .rows = returned,
                             .top_k = routing.expert.cols()});
}

void Experts::backward(Step& step, const Gradient& g, const Router::Saved& routing,
                       const Saved& saved) const {
  const int64_t T = g.dy.rows(), K = routing.expert.cols();
  const DType dtype = g.dy.dtype;
  ExpertExchange& exchange = *step.exchange;
  Frame frame(step.arena);
  return_gradients(step, g, routing, saved);
  exchange.use(saved.plan);
  const int64_t C = exchange.capacity();
  const bool stay = exchange.rows_stay();
  const auto take = [&](int64_t rows, int64_t width, const char* who) {
    return step.arena.take({rows, width}, dtype, who);
  };
  const Tensor returned = saved.returned.row_range(0, T * K);
  Tensor din = take(C, in(), "exchange gradients of rows");
  Tensor rows = stay ? din.row_range(0, T * K) : take(T * K, in(), "exchange gradients returned");
  Tensor sent;
  if (exchange.chunks() > 1) {
    sent = take(T * K, in(), "exchange rows to send again");
    run(step.stream, Permute{.x = saved.x,
                             .source = routing.source,
                             .offsets = routing.offsets,
                             .rows = sent,
                             .top_k = K});
  }
  Tensor staging = stay ? din : take(C, in(), "exchange staging");
  Tensor dout = stay ? saved.returned : take(C, out(), "exchange gradients of outputs");
  Tensor out_staging = stay              ? dout
                       : out() == in() ? staging
                                       : take(C, out(), "exchange staging");
  for (int64_t i = 0; i < exchange.chunks(); ++i) {
    Frame again(step.arena);
    const Chunk chunk = i == 0 ? saved.first : take_chunk(step);
    if (i > 0) {
      exchange.dispatch(step.stream, i, sent, chunk.x, staging);
      hidden_rows(step, chunk);
    }
    exchange.dispatch(step.stream, i, returned, {dout, chunk.x.offsets}, out_staging);
    chunk_backward(step, chunk, dout, din, step.accumulate || i > 0);
    exchange.combine(step.stream, i, {din, chunk.x.offsets}, rows, staging);
  }
  run(step.stream,
      PermuteBackward{
          .drows = rows, .position = routing.position, .dx = g.dx, .accumulate = g.add});
}

}  // namespace moemamba
