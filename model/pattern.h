#pragma once
#include <string>
#include <vector>

#include "model/config.h"

namespace moemamba {

// A block's layers as text: kinds joined by "," (one after the other) and "+" (side by side),
// "mamba, moe" or "mamba + moe". `problem` is empty if the text is one.
struct PatternText {
  BlockPlan plan;
  std::string problem;
};
PatternText read_pattern(const std::string& text);
std::string pattern_text(const BlockPlan& plan);

// How often `kind` stands in one block.
int64_t count_in(const BlockPlan& plan, LayerKind kind);

}  // namespace moemamba
