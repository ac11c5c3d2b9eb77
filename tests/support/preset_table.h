#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace moemamba {

// How long and on what a preset trains (paper.md, section 3.2).
enum class Recipe : uint8_t {
  main_25m,
  ablation,
  main_100m,
  first_version,
  other  // not the paper's
};
struct RunShape {
  int64_t batch, length, steps;
};
RunShape shape_of(Recipe recipe);

// What publications say of a preset. total, active: millions or billions with as many digits as
// they stand there, once as the paper prints them and once as recomputed; null: nowhere.
struct PresetFacts {
  const char* name;
  Recipe recipe;
  float lr;
  const char* total[2];
  const char* active[2];
  bool with_embedding = false;  // the numbers above include embedding and head
};
extern const std::vector<PresetFacts> kPresets;

// Parameters by formulas written out by hand, D and I as in docs/operators.md.
namespace hand {
int64_t mamba(int64_t D, int64_t I);
}
struct HandCount {
  std::string name;
  int64_t total, active;
};
std::vector<HandCount> hand_counts();

}  // namespace moemamba
