#pragma once
#include <string>

namespace moemamba {

// The library and the core type it computes for on this machine: "OpenBLAS 0.3.21 Haswell". Equal
// bits need equal core types (house.md, decision 6).
std::string blas_core();

}  // namespace moemamba
