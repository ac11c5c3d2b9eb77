#pragma once
#include <string>

#include "runtime/inspect.h"

namespace moemamba {

// What `moemamba inspect` prints for people.
std::string list_text(const std::vector<ListedCheckpoint>& list);
std::string show_text(const Checkpoint& checkpoint, bool tensors);
std::string verdict_text(const CheckpointVerdict& verdict);
std::string diff_text(const CheckpointDifference& difference,
                      const std::vector<FactDifference>& facts, bool equal);

}  // namespace moemamba
