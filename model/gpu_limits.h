#pragma once
#include "model/config.h"

namespace moemamba {

// Throws BadSettings that names every setting beyond what a GPU's kernels take, with its value, the
// limit and what to do. REQUIRES: sizes that any device could compute.
void check_gpu_limits(const ModelSizes& sizes);

}  // namespace moemamba
