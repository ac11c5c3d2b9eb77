#pragma once
#include "kernels/cross_entropy.h"

namespace moemamba {

// HeadCrossEntropy in bf16 on Hopper, without logits in memory. False, and nothing done: another
// dtype or GPU, or rows that do not begin on 16-byte borders. REQUIRES: T > 0.
bool run_head_by_wgmma(Stream& stream, const HeadCrossEntropy& op);

// The same by cuBLASLt on chunks of f32 logits, on every GPU: what run() is compared with and timed
// beside where it goes to wgmma. REQUIRES: T > 0.
void run_head_by_blas(Stream& stream, const HeadCrossEntropy& op);

}  // namespace moemamba
