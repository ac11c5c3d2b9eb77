#pragma once
#include <string>
#include <string_view>

#include "parallel/world.h"

namespace moemamba {

// What CMake knew: written by it (build_facts.cc.in).
std::string_view build_version();   // "0.1"
std::string_view build_compiler();  // "GNU 12.2.0"
std::string_view build_flags();     // "-O2 -g1"
std::string_view build_sources();   // a digest of all sources (sources.cmake)
// The schema of RunConfig with its comments: a serialised FileDescriptorSet.
std::string_view run_config_descriptors();

// All that decides about bits, and must be the same on all ranks: version, sources, compiler,
// flags, the core that OpenBLAS computes for, the instruction set of the vector kernels, and in a
// build with CUDA the digest of its table of matmul algorithms.
Facts build_facts();
std::string version_text();  // for --version, one fact a line

}  // namespace moemamba
