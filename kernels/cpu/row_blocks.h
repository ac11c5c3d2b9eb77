#pragma once
#include <algorithm>

#include "core/device.h"

namespace moemamba {

// Rows per block so that a block is worth a thread's while: about 16 K elements.
inline int64_t rows_per_block(int64_t columns) {
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, columns));
}

// Calls body(begin, end) for the fixed blocks of 0 .. rows. The cuts do not depend on the number of
// threads.
template <class Body>
void for_row_blocks(Stream& stream, int64_t rows, int64_t block, Body body) {
  stream.parallel_for((rows + block - 1) / block,
                      [&](int64_t i) { body(i * block, std::min(rows, (i + 1) * block)); });
}

}  // namespace moemamba
