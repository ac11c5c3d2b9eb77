#pragma once
#include <string>
#include <vector>

#include "core/gpu.h"

namespace moemamba::gpu {

// Whether code for `architectures`, as CMAKE_CUDA_ARCHITECTURES names them ("80-real 90a"), runs on
// a GPU of this compute capability (90: 9.0). A cubin runs on its major version from its minor one
// on, that of an "a" on its own alone; PTX without "a" on all that are newer.
bool runs_on(const std::string& architectures, int capability);

// "" where a build for `architectures` has kernels for the first `ranks` of these GPUs; else which
// one it has none for, and what to do.
std::string missing_kernels(const std::string& architectures, const std::vector<Facts>& gpus,
                            int ranks);

}  // namespace moemamba::gpu
