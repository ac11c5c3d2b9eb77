#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace moemamba {

// Limits of the control groups that this process is in, of those above them too: a container shows
// its own as the root. Versions 1 and 2. Nothing: no limit, or none that can be read.
std::optional<int64_t> group_memory_limit();  // bytes
std::optional<double> group_core_limit();     // cores' worth of time

}  // namespace moemamba
