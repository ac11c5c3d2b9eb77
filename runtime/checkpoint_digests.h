#pragma once
#include <cstddef>
#include <string>
#include <vector>

namespace moemamba {

// Memory that is the next bytes of a file.
struct MemoryRun {
  const char* data;
  size_t bytes;
};

// SHA-256, as 64 hex digits, of files that are written from memory. Several at once on this one
// thread where the processor can do that (kernels/sha256.h).
std::vector<std::string> sha256_of_runs(const std::vector<std::vector<MemoryRun>>& files);

}  // namespace moemamba
