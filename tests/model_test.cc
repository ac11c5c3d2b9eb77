#include <gtest/gtest.h>

#include <cmath>

#include "runtime/session.h"
#include "tests/support/cases.h"
#include "tests/support/definitions/model.h"
#include "tests/support/in_world.h"

namespace moemamba {
namespace {

using definition::Weights;

// Backward passes in f32 against central differences of the double-precision definitions, along
// random directions in the space of each parameter: nothing but a right gradient is right along
// all of them. Bound: of the difference, relative to the gradient's norm.
constexpr double kGradientBound = 2e-5;
constexpr double kValueBound = 1e-5;
constexpr int kDirections = 3;

struct Kind {
  ModelConfig::Norm norm = ModelConfig::LAYER_NORM;
  ModelConfig::Activation activation = ModelConfig::RELU;
  int experts = 5, top_k = 1;
  float capacity_factor = 0;
  bool renormalise = false, final_norm = false, resets = false;
  int64_t groups = 3, micro_batches = 1;
  double exchange_rows = 1.25;
};

constexpr Kind kKinds[] = {
    {},
    {.activation = ModelConfig::SWIGLU, .top_k = 2, .renormalise = true, .final_norm = true},
    {.norm = ModelConfig::RMS_NORM, .activation = ModelConfig::GELU, .top_k = 2, .resets = true},
    {.activation = ModelConfig::SILU, .capacity_factor = 0.8f, .groups = 1},
    {.norm = ModelConfig::RMS_NORM, .experts = 0, .final_norm = true},
    {.activation = ModelConfig::SWIGLU, .top_k = 3, .micro_batches = 3, .exchange_rows = 0.2},
};

constexpr int64_t kSequences = 3, kLength = 7, kTokens = kSequences * kLength;

ModelSizes sizes_of(const Kind& kind) {
  ModelConfig config;
  config.set_vocabulary(17);
  config.set_width(10);
  config.set_blocks(2);
  config.set_state(5);
  config.set_dt_rank(3);
  config.set_conv(3);
  config.set_experts(std::max(1, kind.experts));
  if (kind.experts == 0) config.add_pattern("mamba");
  config.set_top_k(kind.top_k);
  config.set_expert_hidden(9);
  config.set_norm(kind.norm);
  config.set_expert_activation(kind.activation);
  config.set_capacity_factor(kind.capacity_factor);
  config.set_renormalise(kind.renormalise);
  config.set_final_norm(kind.final_norm);
  config.set_reset_at_documents(kind.resets);
  return model_sizes(config, 0);
}

// Values of ordinary size for all parameters, so that nothing hides behind ones and zeros.
void disturb(const ParameterStore& store) {
  Case keeper(11);
  for (const Parameter& p : store.parameters()) {
    const bool log = p.name.ends_with("A_log") || p.name.ends_with("dt_proj.bias");
    const double scale = log ? 0.3 : p.shape.dims > 1 ? 0.8 / std::sqrt(p.shape.last()) : 0.5;
    const auto noise = to_doubles(keeper.normal(p.shape, scale));
    auto values = to_doubles(p.value);
    for (size_t i = 0; i < values.size(); ++i) values[i] = noise[i] + (log ? values[i] : 0.1);
    from_doubles(values, p.value);
  }
}

Weights values_of(const ParameterStore& store) {
  Weights weights;
  for (const Parameter& p : store.parameters()) weights[p.name] = to_doubles(p.value);
  return weights;
}
Weights gradients_of(const ParameterStore& store) {
  Weights gradients;
  for (const Parameter& p : store.parameters()) gradients[p.name] = to_doubles(p.gradient);
  return gradients;
}

double norm_of(const std::vector<double>& values) {
  double sum = 0;
  for (double value : values) sum += value * value;
  return std::sqrt(sum);
}

// Fails unless `gradient` is that of f at `at`, name by name.
void expect_gradients(const Weights& gradient, const Weights& at,
                      const std::function<double(const Weights&)>& f) {
  const Random random(5, "directions");
  uint64_t index = 0;
  for (const auto& [name, g] : gradient)
    for (int i = 0; i < kDirections; ++i) {
      std::vector<double> direction(g.size());
      double along = 0;
      for (size_t j = 0; j < g.size(); ++j) {
        direction[j] = random.normal(index++);
        along += direction[j] * g[j];
      }
      const auto value_at = [&](double step) {
        Weights moved = at;
        for (size_t j = 0; j < g.size(); ++j) moved[name][j] += step * direction[j];
        return f(moved);
      };
      constexpr double h = 1e-5;  // small, to stay on this side of kinks and of other choices
      const double numeric =
          (8 * (value_at(h) - value_at(-h)) - (value_at(2 * h) - value_at(-2 * h))) / (12 * h);
      // 1e-8: differences know no better where a gradient is next to nothing.
      EXPECT_NEAR(along, numeric, kGradientBound * norm_of(g) + 1e-8) << name;
    }
}

// Tokens, targets and document starts of a batch, and the scales of its losses.
definition::ModelInput make_input(const ModelSizes& sizes, const Kind& kind) {
  Case keeper(3);
  definition::ModelInput in{.ids = to_doubles(keeper.integers({kTokens}, 0, sizes.V - 1)),
                            .starts = {},
                            .targets = {},
                            .sequences = kSequences,
                            .groups = kind.groups,
                            .loss_scale = 1.0 / kTokens,
                            .balance_scale = 0.05,
                            .z_scale = 0.02};
  for (double id : to_doubles(keeper.integers({kTokens}, 0, sizes.V - 1)))
    in.targets.push_back(int64_t(id));
  if (kind.resets) in.starts = to_doubles(keeper.bytes({kTokens}, 0.2));
  return in;
}

// One step of the model in f32 over `in`; returns its loss, leaves its gradients in the store.
double run_model(Session& session, const Kind& kind, const definition::ModelInput& in) {
  std::vector<int32_t> ids(in.ids.begin(), in.ids.end());
  std::vector<int32_t> targets(in.targets.begin(), in.targets.end());
  std::vector<uint8_t> starts(in.starts.begin(), in.starts.end());
  const ModelSizes& sizes = session.model.sizes();
  std::vector<double> choices(size_t(sizes.routers() * sizes.E)), sums(4);
  RoutingFacts facts{.choices = {}, .sums = view(sums.data(), {4})};
  if (!choices.empty()) facts.choices = view(choices.data(), {sizes.routers(), sizes.E});
  const int64_t sequences = kSequences / kind.micro_batches, T = sequences * kLength;
  double loss = 0;
  for (int64_t i = 0; i < kind.micro_batches; ++i) {
    Step step = session.begin(sequences, kSequences / kind.groups);
    step.facts = &facts;
    step.accumulate = i > 0;
    step.balance_scale = float(in.balance_scale);
    step.z_scale = float(in.z_scale);
    if (kind.resets) step.starts = view(starts.data() + i * T, {T});
    const Tensor losses = step.arena.take({T});
    const Tensor batch = view(ids.data() + i * T, {T});
    session.model.forward(step, batch, session.saved, nullptr);
    session.model.loss(step, view(targets.data() + i * T, {T}), losses, float(in.loss_scale), true,
                       session.saved);
    for (double token : to_doubles(losses)) loss += token * in.loss_scale;
    session.model.backward(step, batch, session.saved, nullptr);
  }
  return loss + in.balance_scale * sums[0] + in.z_scale * sums[1];
}

TEST(LanguageModel, AgreesWithItsDefinitionAndItsGradient) {
  for (const Kind& kind : kKinds) {
    SCOPED_TRACE(&kind - kKinds);
    const ModelSizes sizes = sizes_of(kind);
    in_world(RankLayout(1, 1, kind.experts), [&](ProcessGroups& groups) {
      Session session(groups, sizes, 1, kSequences / kind.micro_batches, kLength,
                      kind.exchange_rows, Session::Memory::training);
      session.store.initialise(1);
      disturb(session.store);
      const definition::ModelInput in = make_input(sizes, kind);
      const Weights weights = values_of(session.store);
      const double expected = definition::language_model_loss(sizes, weights, in);
      EXPECT_NEAR(run_model(session, kind, in), expected, kValueBound * expected);
      expect_gradients(gradients_of(session.store), weights, [&](const Weights& at) {
        return definition::language_model_loss(sizes, at, in);
      });
    });
  }
}

// One layer alone, its input a parameter like the others.
template <class MakeLayer, class Define>
void expect_layer(const Kind& kind, MakeLayer make, Define define) {
  const ModelSizes sizes = sizes_of(kind);
  in_world(RankLayout(1, 1, kind.experts), [&](ProcessGroups& groups) {
    ParameterStore store(groups);
    store.begin_block("layer");
    const auto layer = make(store, sizes);
    store.allocate();
    store.initialise(1);
    disturb(store);
    Case keeper(7);
    const Tensor x = keeper.normal({kTokens, sizes.D}), dy = keeper.normal({kTokens, sizes.D});
    const Tensor dx = keeper.empty({kTokens, sizes.D});
    const std::vector<double> starts =
        kind.resets ? to_doubles(keeper.bytes({kTokens}, 0.2)) : std::vector<double>();
    std::vector<uint8_t> start_bytes(starts.begin(), starts.end());
    const int64_t rows = kTokens * std::max<int64_t>(1, sizes.K);
    ExpertExchange exchange(*groups.expert, groups.layout,
                            std::max<int64_t>(1, int64_t(kind.exchange_rows * double(rows))), rows);
    Stream stream = Stream::immediate();
    Arena arena("layer", DeviceKind::cpu, 1 << 22);
    Step step{.stream = stream,
              .arena = arena,
              .exchange = &exchange,
              .sequences = kSequences,
              .routing_groups = kind.groups,
              .balance_scale = 0.05f,
              .z_scale = 0.02f};
    if (kind.resets) step.starts = view(start_bytes.data(), {kTokens});
    typename std::remove_const_t<decltype(layer)>::Saved saved;
    const auto y = to_doubles(layer.forward(step, x, saved));
    layer.backward(step, dy, dx, saved);

    Weights at = values_of(store), gradients = gradients_of(store);
    at["x"] = to_doubles(x);
    gradients["x"] = to_doubles(dx);
    const auto weigh = to_doubles(dy);
    const auto loss = [&](const Weights& moved) {
      const definition::MoEResult out = define(sizes, moved, starts);
      double sum = 0.05 * out.balance + 0.02 * out.z;
      for (size_t i = 0; i < out.y.size(); ++i) sum += out.y[i] * weigh[i];
      return sum;
    };
    EXPECT_LE(relative_error(y, define(sizes, at, starts).y), kValueBound);
    expect_gradients(gradients, at, loss);
  });
}

TEST(Mamba, AgreesWithItsDefinitionAndItsGradient) {
  for (bool resets : {false, true})
    expect_layer(
        {.experts = 0, .resets = resets},
        [](ParameterStore& store, const ModelSizes& s) { return Mamba::make(store, "m", s, 0); },
        [](const ModelSizes& s, const Weights& w, const std::vector<double>& starts) {
          return definition::MoEResult{
              .y = definition::mamba(s, w, "layer.m", w.at("x"), starts, kSequences)};
        });
}

TEST(MoE, AgreesWithItsDefinitionAndItsGradient) {
  for (const Kind& kind : kKinds) {
    if (kind.experts == 0) continue;
    SCOPED_TRACE(&kind - kKinds);
    expect_layer(
        kind,
        [](ParameterStore& store, const ModelSizes& s) { return MoE::make(store, "m", s, s.E, 0); },
        [&](const ModelSizes& s, const Weights& w, const std::vector<double>&) {
          return definition::moe(s, w, "layer.m", w.at("x"), kind.groups);
        });
  }
}

// The norm has two inputs and two outputs: a sum that goes on, and its norm.
TEST(Norm, PassesOnTheGradientsOfBothItsOutputs) {
  for (ModelConfig::Norm norm : {ModelConfig::LAYER_NORM, ModelConfig::RMS_NORM}) {
    const ModelSizes sizes = sizes_of({.norm = norm, .experts = 0});
    in_world(RankLayout(1, 1, 0), [&](ProcessGroups& groups) {
      ParameterStore store(groups);
      store.begin_block("layer");
      const Norm layer = Norm::make(store, "n", sizes);
      store.allocate();
      disturb(store);
      Case keeper(7);
      const Shape shape{kTokens, sizes.D};
      const Tensor x = keeper.normal(shape), residual = keeper.normal(shape);
      const Tensor dy = keeper.normal(shape), dstream = keeper.normal(shape);
      const auto of_norm = to_doubles(dy), of_sum = to_doubles(dstream);
      Weights at = values_of(store);
      at["x"] = to_doubles(x);
      const auto added = to_doubles(residual);
      Stream stream = Stream::immediate();
      Arena arena("layer", DeviceKind::cpu, 1 << 20);
      Step step{.stream = stream, .arena = arena};
      Norm::Saved saved;
      layer.forward(step, x, residual, saved);
      layer.backward(step, {.dy = dy, .dsum = dstream, .dx = dstream}, saved);
      Weights gradients = gradients_of(store);
      gradients["x"] = to_doubles(dstream);
      expect_gradients(gradients, at, [&](const Weights& moved) {
        auto sum = moved.at("x");
        definition::add_to(sum, added);
        const auto y = definition::norm(sizes, moved, "layer.n", sum);
        double loss = 0;
        for (size_t i = 0; i < y.size(); ++i) loss += of_norm[i] * y[i] + of_sum[i] * sum[i];
        return loss;
      });
    });
  }
}

}  // namespace
}  // namespace moemamba
