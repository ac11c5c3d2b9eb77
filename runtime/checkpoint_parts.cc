#include "runtime/checkpoint_parts.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>

#include "core/error.h"

namespace moemamba {

namespace {

// Files of one report, now counted among all files.
void append(const ShardReport& report, CheckpointManifest& manifest,
            std::map<std::string, CheckpointManifest::Tensor>& tensors) {
  const int before = manifest.files_size();
  for (const auto& file : report.files()) *manifest.add_files() = file;
  for (CheckpointManifest::Tensor part : report.tensors()) {
    for (auto* pieces : {part.mutable_value(), part.mutable_exp_avg(), part.mutable_exp_avg_sq()})
      for (auto& piece : *pieces) piece.set_file(piece.file() + before);
    auto [at, is_new] = tensors.try_emplace(part.name(), part);
    if (is_new) continue;
    at->second.mutable_value()->MergeFrom(part.value());
    at->second.mutable_exp_avg()->MergeFrom(part.exp_avg());
    at->second.mutable_exp_avg_sq()->MergeFrom(part.exp_avg_sq());
  }
}

}  // namespace

std::string shard_name(const char* what, int rank, int ranks) {
  char name[64];
  std::snprintf(name, sizeof name, "%s-%05d-of-%05d.safetensors", what, rank + 1, ranks);
  return name;
}

void merge_reports(const std::vector<std::string>& reports, CheckpointManifest& manifest) {
  std::map<std::string, CheckpointManifest::Tensor> tensors;
  for (const std::string& text : reports) {
    ShardReport report;
    check(report.ParseFromString(text), "a rank's report cannot be read");
    check(report.problem().empty(), report.problem());
    manifest.set_state_hash(manifest.state_hash() + report.state_hash());
    append(report, manifest, tensors);
  }
  const auto by_begin = [](const auto& a, const auto& b) { return a.begin() < b.begin(); };
  for (auto& [name, tensor] : tensors) {
    for (auto* pieces :
         {tensor.mutable_value(), tensor.mutable_exp_avg(), tensor.mutable_exp_avg_sq()})
      std::sort(pieces->begin(), pieces->end(), by_begin);
    *manifest.add_tensors() = tensor;
  }
}

namespace {

// Of either form of a manifest.
template <class AnyManifest>
std::string index_text(const AnyManifest& manifest) {
  nlohmann::ordered_json index;
  int64_t bytes = 0;
  nlohmann::ordered_json map = nlohmann::ordered_json::object();
  for (const auto& tensor : manifest.tensors()) {
    std::optional<int> file;  // of the first piece; none: without elements
    for (const auto& piece : tensor.value()) {
      if (!file) file = piece.file();
      bytes += (piece.end() - piece.begin()) * 4;
    }
    if (file) map[tensor.name()] = manifest.files(*file).name();
  }
  index["metadata"]["total_size"] = bytes;
  index["weight_map"] = map;
  return index.dump(1) + "\n";
}

}  // namespace

std::string weights_index(const CheckpointManifest& manifest) { return index_text(manifest); }
std::string weights_index(const Manifest& manifest) { return index_text(manifest); }

}  // namespace moemamba
