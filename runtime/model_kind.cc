#include "runtime/model_kind.h"

#include <set>

#include "core/schema.h"

namespace moemamba {

namespace {

constexpr const char* kModel = "model";          // ModelConfig in text format
constexpr const char* kTokenizer = "tokenizer";  // "bpe, vocabulary 4096, sha256 ..."

bool of_training_alone(const std::string& setting) {
  static const std::set<std::string> names = {"capacity_factor", "balance_loss", "z_loss",
                                              "reset_at_documents"};
  return names.contains(setting) || setting.rfind("init", 0) == 0;
}

std::string difference(const std::string& setting, const std::string& there,
                       const std::string& here) {
  return concat("\n  ", setting, ": ", there, " there, ", here, " here");
}

std::string model_differences(const ModelConfig& there, const ModelConfig& here) {
  std::map<std::string, std::pair<std::string, std::string>> values;
  for (auto& [setting, value] : resolved_values(there)) values[setting].first = value;
  for (auto& [setting, value] : resolved_values(here)) values[setting].second = value;
  std::string text;
  for (const auto& [setting, value] : values) {
    const auto& [old_value, new_value] = value;
    // 0 is a size that follows from others; where it becomes another one, the shapes tell.
    const bool sizes = old_value == "0" || new_value == "0";
    if (old_value != new_value && !sizes && !of_training_alone(setting))
      text += difference("model." + setting, old_value, new_value);
  }
  return text;
}

std::string describe(const Tokenizer& tokenizer) {
  return concat(tokenizer.description(), ", sha256 ", tokenizer.digest());
}

}  // namespace

std::string describe_tokenizer(const std::optional<Tokenizer>& tokenizer) {
  return tokenizer ? describe(*tokenizer) : "";
}

WeightsMetadata describe_kind(const ModelConfig& model, const std::optional<Tokenizer>& tokenizer) {
  WeightsMetadata kind = {{kModel, resolved_text(model)}};
  if (tokenizer) kind[kTokenizer] = describe(*tokenizer);
  return kind;
}

void check_same_kind(const std::string& path, const ModelConfig& model,
                     const std::optional<Tokenizer>& tokenizer) {
  const WeightsMetadata metadata = read_weights_metadata(path);
  std::string text;
  if (const auto stored = metadata.find(kModel); stored != metadata.end()) {
    ModelConfig there;
    // Problems are left alone: they are settings of other versions.
    Settings(there).read_text(path, stored->second);
    text += model_differences(there, model);
  }
  const auto stored = metadata.find(kTokenizer);
  if (stored != metadata.end() && tokenizer && stored->second != describe(*tokenizer))
    text += difference("tokenizer", stored->second, describe(*tokenizer));
  check(text.empty(), path, ": these weights belong to another kind of model:", text,
        "\nset model.* and data.tokenizer as in the config.textproto of the run that wrote them");
}

}  // namespace moemamba
