#pragma once
#include <optional>

#include "model/model_config.pb.h"
#include "runtime/tokenizer.h"
#include "runtime/weights.h"

namespace moemamba {

// What weights are good for beyond their shapes: the model's settings and the tokenizer, kept in
// the weights' metadata.
WeightsMetadata describe_kind(const ModelConfig& model, const std::optional<Tokenizer>& tokenizer);

// "bpe, vocabulary 4096, sha256 ..."; "" where there is none.
std::string describe_tokenizer(const std::optional<Tokenizer>& tokenizer);

// Throws an Error that names every setting in which the weights at `path` are of another kind: all
// that change what a model computes, but not those of training alone (initial values, losses,
// capacity, resets). Sizes are left to load_weights. Weights that say nothing are taken as they
// are, as is any tokenizer by a model that has none.
void check_same_kind(const std::string& path, const ModelConfig& model,
                     const std::optional<Tokenizer>& tokenizer);

}  // namespace moemamba
