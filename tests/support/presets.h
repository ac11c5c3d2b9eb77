#pragma once
#include <algorithm>
#include <filesystem>
#include <string>
#include <vector>

#include "launcher/settings.h"
#include "model/config.h"

namespace moemamba {

// Names of all files in configs/ itself, in order.
inline std::vector<std::string> preset_names() {
  std::vector<std::string> names;
  for (const auto& entry :
       std::filesystem::directory_iterator(std::string(MOEMAMBA_SOURCE_DIR) + "/configs"))
    if (entry.is_regular_file()) names.push_back(entry.path().stem().string());
  std::sort(names.begin(), names.end());
  return names;
}

// What a training run with configs/NAME.textproto and `options` would be given.
inline RunConfig read_preset(const std::string& name, std::vector<std::string> options = {}) {
  options.push_back("--data.train=tokens");
  const std::string file = std::string(MOEMAMBA_SOURCE_DIR) + "/configs/" + name + ".textproto";
  // The quickstart leaves the number of experts' ranks at 2; all others train on one.
  const int ranks = name == "quickstart" ? 2 : 1;
  return read_settings({.files = {file}, .options = options}, Purpose::train, ranks);
}

inline ModelSizes sizes_of(const RunConfig& config) {
  const int64_t tokenizer = config.model().vocabulary() ? 0 : 8000;  // where the preset leaves it
  return model_sizes(config.model(), tokenizer, config.train().sequence_length());
}

}  // namespace moemamba
