// First values of every kind of tensor: mean, deviation and bounds (shared/reference/paper.md,
// sections 1.6 and 6.2; docs/operators.md, "initial values"). What a sample may be off by follows
// from its size: five standard errors, and ends that fail once in three million times.
#include <gtest/gtest.h>

#include <cmath>

#include "model/language_model.h"
#include "tests/support/cases.h"
#include "tests/support/in_world.h"
#include "tests/support/presets.h"

namespace moemamba {
namespace {

constexpr double kErrors = 5;
constexpr double kRare = 15;            // -ln(3e-7)
constexpr int64_t kElements = 1 << 18;  // of a tensor, at most

// A distribution by what is asked of its samples.
struct Expected {
  double mean, deviation;
  double kurtosis;           // fourth central moment / deviation^4
  double low, high;          // no value lies outside
  double low_end, high_end;  // density at these; 0: no sample need come near
};

Expected constant(double value) {
  return {value, 0, 1, value, value, 0, 0};
}

Expected uniform(double half) {
  return {0, half / std::sqrt(3.0), 1.8, -half, half, 0.5 / half, 0.5 / half};
}

// A normal of deviation `before` without what lies beyond +-cut; moments in closed form.
Expected normal(double before, double cut) {
  const double a = cut / before, inside = std::erf(a * M_SQRT1_2);
  const double edge = std::exp(-a * a / 2) / std::sqrt(2 * M_PI) / inside;
  const double second = 1 - 2 * a * edge, fourth = 3 * second - 2 * a * a * a * edge;
  return {0,
          before * std::sqrt(second),
          fourth / (second * second),
          -cut,
          cut,
          edge / before,
          edge / before};
}

// softplus^-1(dt) with ln dt uniform over ln 0.001 .. ln 0.1: moments by the midpoint rule.
Expected time_step_bias() {
  constexpr int kPoints = 100000;
  const double first = std::log(0.001), span = std::log(100.0);
  const auto value = [](double dt) { return std::log(std::expm1(dt)); };
  double moments[5] = {};
  for (int i = 0; i < kPoints; ++i) {
    const double x = value(std::exp(first + span * (i + 0.5) / kPoints));
    for (int power = 0; power < 5; ++power) moments[power] += std::pow(x, power) / kPoints;
  }
  const double m = moments[1], variance = moments[2] - m * m;
  const double fourth =
      moments[4] - 4 * m * moments[3] + 6 * m * m * moments[2] - 3 * m * m * m * m;
  const auto density = [&](double dt) { return -std::expm1(-dt) / (dt * span); };
  return {m,
          std::sqrt(variance),
          fourth / (variance * variance),
          value(0.001),
          value(0.1),
          density(0.001),
          density(0.1)};
}

void expect_sample(const std::vector<double>& x, const Expected& e) {
  const double n = double(x.size());
  double sum = 0, squares = 0;
  for (double value : x) sum += value;
  const double mean = sum / n;
  for (double value : x) squares += (value - mean) * (value - mean);
  const double deviation = std::sqrt(squares / n);
  const double rounding = 2e-7 * std::max(std::abs(e.low), std::abs(e.high));  // to f32
  EXPECT_NEAR(mean, e.mean, kErrors * e.deviation / std::sqrt(n) + rounding);
  EXPECT_NEAR(deviation, e.deviation,
              kErrors * e.deviation * std::sqrt((e.kurtosis - 1) / (4 * n)) + rounding);
  const auto [low, high] = std::minmax_element(x.begin(), x.end());
  EXPECT_GE(*low, e.low - rounding);
  EXPECT_LE(*high, e.high + rounding);
  // The expected number of samples within d of an end is n d density: kRare of them.
  if (e.low_end > 0) {
    EXPECT_LE(*low, e.low + kRare / (n * e.low_end));
  }
  if (e.high_end > 0) {
    EXPECT_GE(*high, e.high - kRare / (n * e.high_end));
  }
}

// A model's declared tensors, filled one at a time and up to kElements, so that real widths cost
// little.
class FirstValuesOf {
 public:
  explicit FirstValuesOf(const std::string& preset, std::vector<std::string> options = {})
      : sizes(sizes_of(read_preset(preset, std::move(options)))),
        groups_(make_planned_groups(RankLayout(1, 1, int(sizes.E)), 0)),
        store_(groups_),
        model_(sizes, store_, groups_.layout, 0) {}

  std::vector<double> sample(const std::string& name) const {
    for (const Parameter& p : store_.parameters()) {
      if (p.name != name) continue;
      const int64_t columns = p.shape.last();
      const int64_t rows = std::min(p.shape.elements(), kElements) / columns;
      Buffer memory(DeviceKind::cpu, rows * columns * 4);
      const Tensor value = view(memory.data(), {rows, columns}, DType::f32);
      initialise(value, p.initial, 42, p.name);
      return to_doubles(value);
    }
    ADD_FAILURE() << "no tensor is called " << name;
    return {0};
  }
  void expect(const std::string& name, const Expected& expected) const {
    SCOPED_TRACE(name);
    expect_sample(sample(name), expected);
  }

  const ModelSizes sizes;

 private:
  ProcessGroups groups_;
  ParameterStore store_;
  LanguageModel model_;
};

// The paper's normals: variance 0.1 / fan-in, cut at +-0.2.
Expected paper(double fan_in) {
  return normal(std::sqrt(0.1 / fan_in), 0.2);
}
Expected torch(double fan_in) {
  return uniform(1 / std::sqrt(fan_in));
}

TEST(InitialValues, OfThePaperAreThoseOfItsTable) {
  EXPECT_NEAR(paper(1).deviation, 0.1124, 5e-5);
  EXPECT_NEAR(paper(512).deviation, 0.01398, 5e-6);
  EXPECT_NEAR(paper(768).deviation, 0.01141, 5e-6);
  EXPECT_NEAR(paper(2048).deviation, 0.00699, 5e-6);
  EXPECT_NEAR(paper(42 * 1536).deviation, 0.001245, 5e-7);
  EXPECT_NEAR(paper(42 * 2304).deviation, 0.001017, 5e-7);
  EXPECT_NEAR(time_step_bias().low, -6.907, 5e-4);
  EXPECT_NEAR(time_step_bias().high, -2.252, 5e-4);
}

void expect_norms(const FirstValuesOf& model, const char* layer) {
  model.expect(concat("blocks.0.", layer, "_norm.weight"), constant(1));
  model.expect(concat("blocks.0.", layer, "_norm.bias"), constant(0));
}

// D, I, R of Mamba25M and MoE-Mamba100M.
void expect_scan(const FirstValuesOf& model, const std::string& layer) {
  const ModelSizes& s = model.sizes;
  model.expect(layer + ".conv1d.weight", uniform(0.5));
  model.expect(layer + ".conv1d.bias", uniform(0.5));
  model.expect(layer + ".x_proj.weight", torch(double(s.I)));
  model.expect(layer + ".dt_proj.weight", torch(double(s.R)));
  model.expect(layer + ".dt_proj.bias", time_step_bias());
  model.expect(layer + ".D", constant(1));
  const std::vector<double> a_log = model.sample(layer + ".A_log");
  for (size_t i = 0; i < a_log.size(); ++i)
    ASSERT_EQ(a_log[i], double(float(std::log(double(i % 16 + 1))))) << i;
}

TEST(InitialValues, OfMoEMamba) {
  for (const std::string name : {"moe_mamba_25m", "moe_mamba_100m"}) {
    SCOPED_TRACE(name);
    const FirstValuesOf model(name);
    const double D = name == "moe_mamba_25m" ? 512 : 768, I = 2 * D, F = 3 * D;
    model.expect("embedding.weight", paper(1));
    model.expect("head.weight", paper(D));
    model.expect("blocks.0.mamba.in_proj.weight", torch(D));
    model.expect("blocks.0.mamba.out_proj.weight", torch(I));
    expect_scan(model, "blocks.0.mamba");
    model.expect("blocks.0.moe.router.weight", paper(D));
    model.expect("blocks.0.moe.experts.{}.up.weight", paper(D));
    model.expect("blocks.0.moe.experts.{}.down.weight", paper(42 * F));
    expect_norms(model, "mamba");
    expect_norms(model, "moe");
  }
}

TEST(InitialValues, OfATransformer) {
  for (const char* name : {"transformer_25m", "transformer_v1_25m"}) {
    const FirstValuesOf model(name);
    model.expect("blocks.0.attention.qkv_proj.weight", paper(512));
    model.expect("blocks.0.attention.out_proj.weight", paper(512));
    model.expect("blocks.0.feed_forward.up.weight", paper(512));
    model.expect("blocks.0.feed_forward.up.bias", torch(512));
    model.expect("blocks.0.feed_forward.down.weight", paper(2048));
    model.expect("blocks.0.feed_forward.down.bias", torch(2048));
    expect_norms(model, "attention");
    expect_norms(model, "feed_forward");
  }
  FirstValuesOf("transformer_v1_25m").expect("embedding.positions.weight", paper(1));
}

// Experts are as elsewhere; projections without experts are torch's, as in a Mamba layer.
TEST(InitialValues, OfAnInnerMoE) {
  const FirstValuesOf model("inner_moe_gate_output_all_25m");
  const std::string layer = "blocks.0.mamba";
  model.expect(layer + ".conv_proj.weight", torch(512));
  model.expect(layer + ".gate_proj.router.weight", paper(512));
  model.expect(layer + ".gate_proj.experts.{}.up.weight", paper(512));
  model.expect(layer + ".gate_proj.experts.{}.down.weight", paper(12 * 352));
  model.expect(layer + ".out_proj.router.weight", paper(1024));
  model.expect(layer + ".out_proj.experts.{}.up.weight", paper(1024));
  model.expect(layer + ".out_proj.experts.{}.down.weight", paper(12 * 352));
  expect_scan(model, layer);
  expect_norms(model, "mamba");
}

TEST(InitialValues, OfRoutingMamba) {
  const FirstValuesOf model("routing_mamba_25m");
  model.expect("blocks.0.mamba.router.weight", paper(512));
  for (const char* projection : {"conv_proj", "gate_proj"})
    model.expect(concat("blocks.0.mamba.", projection, ".experts.{}.weight"), torch(512));
  model.expect("blocks.0.mamba.out_proj.experts.{}.weight", torch(1024));
}

TEST(InitialValues, OfASharedExpertHaveItsOwnFanIn) {
  const FirstValuesOf model("sigmoid_moe_mamba_25m");
  model.expect("blocks.0.moe.shared.up.weight", paper(512));
  model.expect("blocks.0.moe.shared.down.weight", paper(384));
  model.expect("blocks.0.moe.experts.{}.down.weight", paper(128 * 384));
}

TEST(InitialValues, OfRatiosFollowTheInnerWidth) {
  const FirstValuesOf model("ratio_1_5_25m");
  model.expect("blocks.0.mamba.x_proj.weight", torch(341));
  model.expect("blocks.0.mamba.out_proj.weight", torch(341));
}

// The same deviation before the cut, which is at two of them; an expert's second matrix counts
// its own fan-in alone.
TEST(InitialValues, OfSwitch) {
  const auto recipe = [](double fan_in) {
    const double before = std::sqrt(0.1 / fan_in);
    return normal(before, 2 * before);
  };
  const FirstValuesOf model("moe_mamba_25m", {"--model.init=SWITCH"});
  model.expect("embedding.weight", recipe(1));
  model.expect("head.weight", recipe(512));
  model.expect("blocks.0.moe.router.weight", recipe(512));
  model.expect("blocks.0.moe.experts.{}.up.weight", recipe(512));
  model.expect("blocks.0.moe.experts.{}.down.weight", recipe(1536));
  model.expect("blocks.0.mamba.in_proj.weight", torch(512));
  model.expect("blocks.0.mamba.out_proj.weight", torch(1024));
  expect_scan(model, "blocks.0.mamba");
}

// Embedding of deviation 0.02, torch's linear layers without biases' noise; what writes to the
// residual stream is divided by the root of how many do.
TEST(InitialValues, OfMambaSsm) {
  const FirstValuesOf moe("moe_mamba_25m", {"--model.init=MAMBA_SSM"});
  moe.expect("embedding.weight", normal(0.02, 0.16));
  moe.expect("head.weight", torch(512));
  moe.expect("blocks.0.moe.router.weight", torch(512));
  moe.expect("blocks.0.moe.experts.{}.up.weight", torch(512));
  moe.expect("blocks.0.moe.experts.{}.down.weight", torch(1536 * 16));
  moe.expect("blocks.0.mamba.in_proj.weight", torch(512));
  moe.expect("blocks.0.mamba.out_proj.weight", torch(1024 * 16));
  expect_scan(moe, "blocks.0.mamba");
  const FirstValuesOf dense("mamba_mlp_25m", {"--model.init=MAMBA_SSM"});
  dense.expect("blocks.0.feed_forward.up.bias", constant(0));
  dense.expect("blocks.0.feed_forward.down.weight", torch(1536 * 16));
  dense.expect("blocks.0.feed_forward.down.bias", constant(0));
}

TEST(InitialValues, OfJambasNormsAreOne) {
  const FirstValuesOf model("jamba_mini_shape");
  for (const char* norm : {"dt_norm", "b_norm", "c_norm"})
    model.expect(concat("blocks.0.mamba.", norm, ".weight"), constant(1));
  model.expect("final.norm.weight", constant(1));
  model.expect("blocks.0.mamba_norm.weight", constant(1));
  model.expect("blocks.1.moe.experts.{}.gate.weight", torch(4096));
}

TEST(InitialValues, FollowTheScale) {
  const FirstValuesOf model("moe_mamba_25m", {"--model.init_scale=0.4"});
  model.expect("embedding.weight", normal(std::sqrt(0.4), 0.8));
  model.expect("head.weight", normal(std::sqrt(0.4 / 512), 0.8));
}

// Each tensor, each expert and each seed has numbers of its own.
TEST(InitialValues, AreNotSharedBetweenTensors) {
  ModelConfig config;
  config.set_vocabulary(50);
  config.set_width(32);
  config.set_blocks(1);
  config.set_experts(3);
  in_world(RankLayout(1, 1, 3), [&](ProcessGroups& groups) {
    ParameterStore store(groups);
    const LanguageModel model(model_sizes(config, 0), store, groups.layout, 0);
    store.allocate(ParameterStore::Memory::values);
    std::map<double, std::string> owners;  // of the first value of each random tensor
    for (uint64_t seed : {1, 2}) {
      store.initialise(seed);
      for (const NamedTensor& tensor : store.named_tensors()) {
        const double first = to_doubles(tensor.value)[0];
        if (first == 0 || first == 1) continue;  // norms, A_log and D
        const auto [owner, fresh] = owners.emplace(first, tensor.name);
        EXPECT_TRUE(fresh) << tensor.name << " begins as " << owner->second;
      }
    }
    EXPECT_EQ(owners.size(), 2u * 16u);
  });
}

}  // namespace
}  // namespace moemamba
