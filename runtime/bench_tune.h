#pragma once
#include <iosfwd>

#include "runtime/trainer.h"

namespace moemamba {

// Takes one training step on this rank's GPU to see every product that there is, with its real
// strides, then tunes their algorithms (kernels/matmul_tuning.h) and writes lines for
// kernels/cuda/matmul_table.inc. Every rank calls it; rank 0 writes. An Error on the CPU.
void bench_tune(ProcessGroups& groups, const TrainerOptions& options, std::ostream& out);

}  // namespace moemamba
