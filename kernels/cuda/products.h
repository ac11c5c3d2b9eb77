#pragma once
#include "kernels/matmul.h"

namespace moemamba {

// Whether cuBLASLt (kernels/cuda/blas.h) takes these dtypes together and has an algorithm for these
// shapes and strides. REQUIRES: no extent is 0.
bool blas_takes(Stream& stream, const Matmul& op);
// Enqueues op by cuBLASLt if it takes it. False: nothing done.
bool multiply_by_blas(Stream& stream, const Matmul& op);

// What cuBLASLt does not take as it is: operands are widened to dense f32 ones in `scratch`, of
// widened_bytes(op), and a bf16 result is rounded (or added to) once, from f32.
int64_t widened_bytes(const Matmul& op);
void multiply_widened(Stream& stream, const Matmul& op, std::byte* scratch);

// How grouped products of bf16 are computed. By wgmma only where the GPU is a Hopper and rows of a
// and b lie on 16-byte borders; by mma.sync elsewhere. run() has one choice; the others are what it
// is compared with and timed beside.
enum class GroupedBy { mma_sync, wgmma, wgmma_in_pairs };
void multiply_groups(Stream& stream, const GroupedMatmul& op, GroupedBy by);
void multiply_groups(Stream& stream, const GroupedOuter& op, GroupedBy by);

}  // namespace moemamba
