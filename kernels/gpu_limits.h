#pragma once
#include <cstdint>

namespace moemamba {

// What the kernels of kernels/cuda were made for, and no contract of an operator knows: the CPU
// takes more. model/gpu_limits.h holds a model's settings to it before any memory is taken.
constexpr int64_t kMostExpertsOnGpu = 1024;  // of a router
constexpr int64_t kWidestNormOnGpu = 8192;   // numbers of a normalised row
constexpr int64_t kWidestHeadOnGpu = 256;    // numbers of a head of attention

}  // namespace moemamba
