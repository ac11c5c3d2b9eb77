#pragma once
#include "model/config.h"

namespace moemamba {

// Parameters of a whole model, as its layers declare them.
struct ModelCounts {
  int64_t total = 0;   // without embedding, positions and head
  int64_t active = 0;  // of these, met by one token: K of E experts
  int64_t embedding_and_head = 0;
};
ModelCounts count_model(const ModelSizes& sizes);

}  // namespace moemamba
