// Every file in configs/ is the model that its name promises: the parameters that the paper
// gives, and the values that its traps ask for (shared/reference/paper.md, sections 1, 3 and 8).
#include "tests/support/presets.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "core/file.h"
#include "model/counts.h"
#include "tests/support/preset_table.h"

namespace moemamba {
namespace {

// n in the unit and with the digits of `like` ("542.2M"), rounded.
std::string as(const std::string& like, int64_t n) {
  const size_t point = like.find('.');
  const int digits = point == std::string::npos ? 0 : int(like.size() - point - 2);
  char text[64];
  std::snprintf(text, sizeof text, "%.*f%c", digits, double(n) / (like.back() == 'B' ? 1e9 : 1e6),
                like.back());
  return text;
}

TEST(Presets, AreAllInTheTable) {
  std::vector<std::string> names;
  for (const PresetFacts& facts : kPresets) names.push_back(facts.name);
  std::sort(names.begin(), names.end());
  EXPECT_EQ(names, preset_names());
}

TEST(Presets, WriteToAFolderOfTheirName) {
  for (const PresetFacts& facts : kPresets)
    EXPECT_EQ(read_preset(facts.name).run(), std::string("runs/") + facts.name);
}

TEST(Presets, HaveTheParametersOfThePaperToItsLastDigit) {
  for (const PresetFacts& facts : kPresets) {
    SCOPED_TRACE(facts.name);
    const ModelCounts counts = count_model(sizes_of(read_preset(facts.name)));
    const int64_t ends = facts.with_embedding ? counts.embedding_and_head : 0;
    for (const char* total : facts.total)
      if (total) {
        EXPECT_EQ(as(total, counts.total + ends), total);
      }
    for (const char* active : facts.active)
      if (active) {
        EXPECT_EQ(as(active, counts.active + ends), active);
      }
  }
}

// Head and embedding are two matrices; nothing else counts among them but learned positions.
TEST(Presets, HaveAnUntiedHead) {
  for (const PresetFacts& facts : kPresets) {
    const ModelSizes s = sizes_of(read_preset(facts.name));
    EXPECT_EQ(count_model(s).embedding_and_head, (2 * s.V + s.learned_positions) * s.D)
        << facts.name;
  }
}

// 210 to 227 millions; 231 where one projection in every other layer has 48 experts, which is
// 8 linear projections more than 24 experts in every layer.
TEST(Presets, OfInnerMoEAreOfOneSize) {
  for (const PresetFacts& facts : kPresets) {
    const std::string name = facts.name;
    if (!name.starts_with("inner_moe_")) continue;
    const ModelSizes sizes = sizes_of(read_preset(name));
    const double millions = std::round(double(count_model(sizes).total) / 1e6);
    EXPECT_GE(millions, 210) << name;
    EXPECT_LE(millions, sizes.E == 48 ? 231 : 227) << name;
  }
}

// Each formula stands on its own and knows nothing of the program's layers.
TEST(Presets, HaveTheParametersThatFormulasByHandGive) {
  EXPECT_EQ(hand::mamba(512, 1024), 1694720);
  EXPECT_EQ(hand::mamba(768, 1536), 3770880);
  for (const HandCount& expected : hand_counts()) {
    SCOPED_TRACE(expected.name);
    const ModelCounts counts = count_model(sizes_of(read_preset(expected.name)));
    EXPECT_EQ(counts.total, expected.total);
    EXPECT_EQ(counts.active, expected.active);
  }
}

TEST(Presets, OfRatiosHaveTheInnerWidthsOfThePaper) {
  const std::pair<const char*, int64_t> widths[] = {{"1_5", 341},  {"2_4", 682},  {"3_3", 1024},
                                                    {"4_2", 1365}, {"5_1", 1706}, {"6_0", 2048}};
  for (const auto& [ratio, width] : widths)
    EXPECT_EQ(sizes_of(read_preset(std::string("ratio_") + ratio + "_25m")).I, width) << ratio;
}

// Trap 1, 2, 3, 4: norms, head and recipe of first values (initial_values_test has the numbers).
void expect_model_of_the_paper(const ModelSizes& s, const std::string& name) {
  EXPECT_EQ(s.norm, NormKind::layer);
  EXPECT_EQ(s.norm_eps, 1e-5f);
  EXPECT_FALSE(s.post_norm);
  EXPECT_FALSE(s.final_norm);
  EXPECT_EQ(s.V, 50257);
  EXPECT_EQ(s.init, ModelConfig::PAPER);
  EXPECT_EQ(s.init_scale, 0.1f);
  EXPECT_FALSE(s.reset_at_documents);
  EXPECT_EQ(s.N, 16);
  EXPECT_EQ(s.W, 4);
  EXPECT_EQ(s.R, s.D / 16);
  EXPECT_FALSE(s.mamba_norms);
  EXPECT_EQ(s.H, name.starts_with("transformer") ? s.D / 64 : 4);
  EXPECT_EQ(s.Hkv, s.H);
  EXPECT_FALSE(s.attention_bias);
  EXPECT_TRUE(s.feed_forward_bias);
  EXPECT_EQ(s.feed_forward.activation, Activation::relu);
  EXPECT_FALSE(s.feed_forward.gated);
  EXPECT_TRUE(name.starts_with("transformer") || s.positions == ModelConfig::NONE);
}

// Trap 6 and 7, and what else section 2 says of routers.
void expect_router_of_the_paper(const ModelSizes& s, const TrainConfig& train) {
  if (s.routers() == 0) return;
  EXPECT_EQ(s.K, 1);
  EXPECT_FALSE(s.sigmoid_router);
  EXPECT_FALSE(s.renormalise);
  EXPECT_EQ(s.router_bias_rate, 0);
  EXPECT_EQ(s.routed_scale, 1);
  EXPECT_EQ(s.shared_hidden, 0);
  EXPECT_EQ(s.expert.activation, Activation::relu);
  EXPECT_FALSE(s.expert.gated);
  EXPECT_FALSE(s.linear_projections);
  EXPECT_EQ(s.projection_hidden, 352);
  EXPECT_EQ(s.capacity_factor, 1.0);
  EXPECT_EQ(s.balance_loss, 0.01f);  // of the mean over layers
  EXPECT_EQ(s.z_loss, 0);
  EXPECT_EQ(train.routing_group() * train.sequence_length(), s.D == 512 ? 65536 : 131072);
}

// Trap 5 and 9, and what else section 3.1 says of training.
void expect_training_of_the_paper(const RunConfig& config) {
  const TrainConfig& train = config.train();
  EXPECT_EQ(train.beta1(), 0.9f);
  EXPECT_EQ(train.beta2(), 0.999f);
  EXPECT_EQ(train.adam_eps(), 1e-8f);
  EXPECT_EQ(train.weight_decay(), 0.1f);
  EXPECT_EQ(train.grad_clip(), 0.5f);
  EXPECT_EQ(train.final_lr_fraction(), 0.1f);
  EXPECT_EQ(train.warmup_steps() * 100, train.steps());
  EXPECT_EQ(train.micro_batch_size(), 0);  // nothing is accumulated
  EXPECT_EQ(train.eval_interval(), 1000);
  EXPECT_EQ(train.eval_tokens(), 10 * train.global_batch_size() * train.sequence_length());
  EXPECT_EQ(config.data().sampling(), DataConfig::CIRCULAR);
}

TEST(Presets, OfThePaperAvoidEveryTrap) {
  for (const PresetFacts& facts : kPresets) {
    if (facts.recipe == Recipe::other) continue;
    SCOPED_TRACE(facts.name);
    const RunConfig config = read_preset(facts.name);
    const ModelSizes sizes = sizes_of(config);
    expect_model_of_the_paper(sizes, facts.name);
    expect_router_of_the_paper(sizes, config.train());
    expect_training_of_the_paper(config);
  }
}

TEST(Presets, OfThePaperHaveItsBatchesStepsAndRates) {
  for (const PresetFacts& facts : kPresets) {
    if (facts.recipe == Recipe::other) continue;
    SCOPED_TRACE(facts.name);
    const TrainConfig train = read_preset(facts.name).train();
    const RunShape shape = shape_of(facts.recipe);
    EXPECT_EQ(train.global_batch_size(), shape.batch);
    EXPECT_EQ(train.sequence_length(), shape.length);
    EXPECT_EQ(train.steps(), shape.steps);
    EXPECT_EQ(train.lr(), facts.lr);
  }
}

// What a router of the paper may give to one expert: floor(T / E) of its group.
TEST(Presets, HaveTheCapacitiesOfThePaper) {
  const std::pair<const char*, int64_t> capacities[] = {{"moe_mamba_25m", 1560},
                                                        {"transformer_moe_25m", 2048},
                                                        {"moe_mamba_100m", 3120},
                                                        {"transformer_moe_100m", 4096}};
  for (const auto& [name, rows] : capacities) {
    const RunConfig config = read_preset(name);
    const int64_t T = config.train().routing_group() * config.train().sequence_length();
    EXPECT_EQ(int64_t(config.model().capacity_factor() * double(T) / config.model().experts()),
              rows)
        << name;
  }
}

TEST(Presets, OfTransformersKnowTheirPositions) {
  for (const char* name : {"transformer_25m", "transformer_moe_25m", "transformer_moe_100m"}) {
    const ModelSizes s = sizes_of(read_preset(name));
    EXPECT_EQ(s.positions, ModelConfig::ROPE) << name;
    EXPECT_EQ(s.rope_base, 10000) << name;
    EXPECT_EQ(s.dh, 64) << name;
  }
  EXPECT_EQ(sizes_of(read_preset("transformer_v1_25m")).learned_positions, 256);
}

TEST(Presets, OfOtherWorkHaveItsRouters) {
  const ModelSizes mixtral = sizes_of(read_preset("mixtral_8x7b"));
  EXPECT_TRUE(mixtral.renormalise);
  EXPECT_EQ(mixtral.Hkv, 8);
  EXPECT_EQ(mixtral.dh, 128);
  const ModelSizes jamba = sizes_of(read_preset("jamba_mini_shape"));
  EXPECT_FALSE(jamba.renormalise);
  EXPECT_TRUE(jamba.mamba_norms);
  EXPECT_EQ(jamba.layers(LayerKind::feed_forward), 16);
  EXPECT_EQ(jamba.layers(LayerKind::moe), 16);
  for (const ModelSizes& s : {mixtral, jamba}) {
    EXPECT_EQ(s.K, 2);
    EXPECT_EQ(s.norm, NormKind::rms);
    EXPECT_TRUE(s.final_norm);
    EXPECT_TRUE(s.expert.gated);
  }
  const ModelSizes routing = sizes_of(read_preset("routing_mamba_25m"));
  EXPECT_EQ(routing.routers(), 16);  // one a layer, for three projections
  const ModelSizes sigmoid = sizes_of(read_preset("sigmoid_moe_mamba_25m"));
  EXPECT_TRUE(sigmoid.sigmoid_router && sigmoid.renormalise);
  EXPECT_EQ(sigmoid.capacity_factor, 0);
}

// The row of each preset in docs/models.md ends with its parameters.
TEST(Presets, AreDocumentedWithTheirParameters) {
  const std::string page = read_file(std::string(MOEMAMBA_SOURCE_DIR) + "/docs/models.md");
  const auto shown = [](int64_t n) { return as(n < int64_t(1e10) ? "0.0M" : "0.0B", n); };
  for (const PresetFacts& facts : kPresets) {
    const ModelCounts counts = count_model(sizes_of(read_preset(facts.name)));
    const std::string row = concat("| [", facts.name, "](../configs/", facts.name, ".textproto) | ",
                                   shown(counts.total), " | ", shown(counts.active), " |");
    EXPECT_NE(page.find(row), std::string::npos) << "docs/models.md lacks\n" << row;
  }
}

}  // namespace
}  // namespace moemamba
