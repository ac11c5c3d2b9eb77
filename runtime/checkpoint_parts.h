#pragma once
#include <string>
#include <vector>

#include "runtime/manifest.h"

namespace moemamba {

// What follows from a checkpoint's shards: names, the manifest's tensors, the index.
constexpr const char* kIndexName = "model.safetensors.index.json";

// By kind of state. A kind a file, for a digest goes through its file from end to end: so there is
// work for some cores even where one rank writes all.
constexpr const char* kShardNames[] = {"model", "optimizer-exp_avg", "optimizer-exp_avg_sq"};

// model-00001-of-00004.safetensors
std::string shard_name(const char* what, int rank, int ranks);

// Adds to `manifest` what the ranks report, in their order: files, sum of state hashes, tensors by
// name with their pieces in order. An Error where a report cannot be read or tells of a problem.
void merge_reports(const std::vector<std::string>& reports, CheckpointManifest& manifest);

// model.safetensors.index.json, as Hugging Face tools expect it.
std::string weights_index(const CheckpointManifest& manifest);
std::string weights_index(const Manifest& manifest);

}  // namespace moemamba
