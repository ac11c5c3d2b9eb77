#pragma once
#include "parallel/gradient_buckets.h"

namespace moemamba {

// Buckets of several sizes, one of them empty: sums in rank order and values gathered from their
// owners, bit for bit, in memory of the streams' device. Throws where a bit differs.
void reduce_and_gather(Communicator& group, Stream& compute, Stream& communication);

}  // namespace moemamba
