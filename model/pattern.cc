#include "model/pattern.h"

#include <algorithm>

#include "core/error.h"

namespace moemamba {

namespace {

constexpr LayerKind kKinds[] = {LayerKind::mamba, LayerKind::inner_moe, LayerKind::attention,
                                LayerKind::feed_forward, LayerKind::moe};

std::string trimmed(const std::string& text) {
  const size_t first = text.find_first_not_of(" \t\n"), last = text.find_last_not_of(" \t\n");
  return first == std::string::npos ? "" : text.substr(first, last - first + 1);
}

std::vector<std::string> split(const std::string& text, char at) {
  std::vector<std::string> parts;
  size_t begin = 0;
  for (size_t end; (end = text.find(at, begin)) != std::string::npos; begin = end + 1)
    parts.push_back(trimmed(text.substr(begin, end - begin)));
  parts.push_back(trimmed(text.substr(begin)));
  return parts;
}

// Both Mamba kinds carry the same names, so a block holds one of them at most.
bool same_name(LayerKind a, LayerKind b) {
  const auto name = [](LayerKind kind) {
    return kind == LayerKind::inner_moe ? LayerKind::mamba : kind;
  };
  return name(a) == name(b);
}

}  // namespace

const char* name_of(LayerKind kind) {
  switch (kind) {
    case LayerKind::mamba:
      return "mamba";
    case LayerKind::inner_moe:
      return "inner_moe";
    case LayerKind::attention:
      return "attention";
    case LayerKind::feed_forward:
      return "feed_forward";
    case LayerKind::moe:
      return "moe";
  }
  return "?";
}

PatternText read_pattern(const std::string& text) {
  PatternText result;
  std::vector<LayerKind> seen;
  for (const std::string& sub_layer : split(text, ',')) {
    SubLayerPlan& plan = result.plan.emplace_back();
    for (const std::string& word : split(sub_layer, '+')) {
      const auto* kind = std::find_if(std::begin(kKinds), std::end(kKinds),
                                      [&](LayerKind k) { return word == name_of(k); });
      if (kind == std::end(kKinds)) {
        result.problem = concat("\"", text, "\": no layer is called \"", word,
                                "\"; join mamba, inner_moe, attention, feed_forward and moe by "
                                "\",\" (one after the other) or \"+\" (side by side)");
        return result;
      }
      if (std::any_of(seen.begin(), seen.end(), [&](LayerKind k) { return same_name(k, *kind); })) {
        result.problem = concat("\"", text, "\": a block has one ", name_of(*kind),
                                " layer at most; give further patterns, which take turns, and "
                                "more model.blocks");
        return result;
      }
      seen.push_back(*kind);
      plan.push_back(*kind);
    }
  }
  return result;
}

std::string pattern_text(const BlockPlan& plan) {
  std::string text;
  for (size_t i = 0; i < plan.size(); ++i)
    for (size_t j = 0; j < plan[i].size(); ++j)
      text += concat(j ? " + " : i ? ", " : "", name_of(plan[i][j]));
  return text;
}

int64_t count_in(const BlockPlan& plan, LayerKind kind) {
  int64_t count = 0;
  for (const SubLayerPlan& layers : plan) count += std::count(layers.begin(), layers.end(), kind);
  return count;
}

}  // namespace moemamba
