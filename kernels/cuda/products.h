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

// Grouped products by mma.sync (f32: by FFMA) on every GPU: what run() is compared with and timed
// beside where it goes to wgmma.
void multiply_by_mma(Stream& stream, const GroupedMatmul& op);
void multiply_by_mma(Stream& stream, const GroupedOuter& op);

}  // namespace moemamba
