// Settings of a model that contradict each other: all of them are named at once, each with its
// place and with what would be taken.
#include <gtest/gtest.h>

#include <sstream>

#include "launcher/settings.h"
#include "tests/support/temporary_folder.h"

namespace moemamba {
namespace {

// The lines of the refusal of `text` as a configuration file, the file's path replaced by "file".
std::vector<std::string> refusal(const std::string& text) {
  const TemporaryFolder folder;
  const std::string path = folder.put("run.textproto", text);
  std::istringstream message(message_of([&] {
    read_settings({.files = {path}, .options = {"--data.train=tokens"}}, Purpose::train, 1);
  }));
  std::vector<std::string> lines;
  for (std::string line; std::getline(message, line);) {
    if (line.starts_with(path)) line.replace(0, path.size(), "file");
    lines.push_back(line);
  }
  return lines;
}
using Lines = std::vector<std::string>;

void expect_accepted(const std::string& text) {
  const TemporaryFolder folder;
  const std::string path = folder.put("run.textproto", text);
  EXPECT_NO_THROW(
      read_settings({.files = {path}, .options = {"--data.train=tokens"}}, Purpose::train, 1))
      << text;
}

TEST(ModelOptions, RefusesLayersThatThereAreNot) {
  EXPECT_EQ(
      refusal("model {\n  pattern: \"mamba, mlp\"\n}\n"),
      Lines{"file:2:3: model.pattern: \"mamba, mlp\": no layer is called \"mlp\"; join "
            "mamba, inner_moe, attention, feed_forward and moe by \",\" (one after the other) "
            "or \"+\" (side by side)"});
  EXPECT_EQ(refusal("model {\n  pattern: \"mamba,\"\n}\n").size(), 1u);
}

TEST(ModelOptions, RefusesTwoLayersOfAKindInABlock) {
  for (const char* pattern : {"mamba, moe, mamba", "inner_moe, moe, mamba"})
    EXPECT_EQ(refusal(concat("model {\n  pattern: \"", pattern, "\"\n}\n")),
              Lines{concat("file:2:3: model.pattern: \"", pattern,
                           "\": a block has one mamba layer at most; give further patterns, which "
                           "take turns, and more model.blocks")});
}

TEST(ModelOptions, RefusesAParallelBlockWithoutMamba) {
  for (const std::string pattern : {"moe + feed_forward", "attention + moe"})
    EXPECT_EQ(refusal("model {\n  pattern: \"" + pattern + "\"\n}\n"),
              Lines{"file:2:3: model.pattern: \"" + pattern +
                    "\": layers side by side need a "
                    "mamba or inner_moe layer among them; try \"mamba + moe\""});
}

TEST(ModelOptions, RefusesPatternsThatNeverStand) {
  EXPECT_EQ(refusal("model {\n  blocks: 1\n  pattern: \"mamba\"\n  pattern: \"mamba, moe\"\n}\n"),
            Lines{"file:4:3: model.pattern: 2 patterns take turns, but model.blocks is 1: "
                  "the last ones would never stand"});
}

TEST(ModelOptions, RefusesProjectionsWithoutTheirLayerAndTheLayerWithoutThem) {
  EXPECT_EQ(refusal("model {\n  projections: CONV\n}\n"),
            Lines{"file:2:3: model.projections: belongs to an inner_moe layer, but model.pattern "
                  "has none; put one there, or leave this out"});
  EXPECT_EQ(refusal("model {\n  pattern: \"inner_moe\"\n}\n"),
            Lines{"model.projections: an inner_moe layer (model.pattern) needs to know which "
                  "projections consist of experts: CONV, GATE, OUTPUT or several of them"});
}

TEST(ModelOptions, NamesEveryContradictionOfTheRouterAtOnce) {
  EXPECT_EQ(refusal("model {\n"
                    "  pattern: \"inner_moe\"\n"
                    "  projections: CONV\n"
                    "  experts: 4\n"
                    "  top_k: 5\n"
                    "  capacity_factor: 1.0\n"
                    "  router_bias_rate: 1e-3\n"
                    "  shared_hidden: 64\n"
                    "}\n"),
            (Lines{"file:5:3: model.top_k: must be at most the 4 experts (model.experts), found 5",
                   "file:7:3: model.router_bias_rate: a bias balances the experts of a dropless "
                   "model; set model.capacity_factor to 0, or this",
                   "file:8:3: model.shared_hidden: a shared expert belongs to a moe layer, but "
                   "model.pattern has none; set it 0"}));
}

TEST(ModelOptions, NamesEveryContradictionOfAttentionAtOnce) {
  EXPECT_EQ(refusal("model {\n"
                    "  pattern: \"attention, moe\"\n"
                    "  width: 46\n"
                    "  heads: 6\n"
                    "  kv_heads: 4\n"
                    "  positions: ROPE\n"
                    "}\n"),
            (Lines{"file:4:3: model.heads: 6 heads do not divide the width 46 (model.width); take "
                   "a divisor, or set model.head_width",
                   "file:5:3: model.kv_heads: must divide the 6 heads (model.heads), found 4",
                   "file:6:3: model.positions: rotary positions turn pairs, but a head is 7 wide; "
                   "take an even model.head_width or other model.heads"}));
  EXPECT_EQ(refusal("model {\n  positions: ROPE\n}\n"),
            Lines{"file:2:3: model.positions: rotary positions belong to attention, but "
                  "model.pattern has no attention layer; take NONE"});
}

TEST(ModelOptions, NamesContradictionsOfAllPartsAtOnce) {
  EXPECT_EQ(refusal("model {\n"
                    "  pattern: \"moe + feed_forward\"\n"
                    "  projections: [GATE, OUTPUT]\n"
                    "  experts: 2\n"
                    "  top_k: 3\n"
                    "  positions: ROPE\n"
                    "}\n"
                    "train { steps: 10 warmup_steps: 11 }\n")
                .size(),
            5u);
}

// The nearest settings that are none of these contradictions.
TEST(ModelOptions, AcceptsWhatItsRefusalsPropose) {
  expect_accepted("model { pattern: \"mamba + moe\" }");
  expect_accepted("model { blocks: 2 pattern: \"mamba\" pattern: \"mamba, moe\" }");
  expect_accepted("model { pattern: \"inner_moe\" projections: [CONV, GATE, OUTPUT] }");
  expect_accepted("model { experts: 4 top_k: 4 router_bias_rate: 1e-3 shared_hidden: 64 }");
  expect_accepted("model { experts: 4 capacity_factor: 1.0 shared_hidden: 64 }");
  expect_accepted(
      "model { pattern: \"attention, moe\" width: 46 heads: 6 kv_heads: 3 head_width: 8 "
      "positions: ROPE }");
}

}  // namespace
}  // namespace moemamba
