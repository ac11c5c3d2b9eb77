#pragma once
#include <cstdint>

namespace moemamba {

// Threads of one rank when `ranks` of them share this machine: its cores by number of ranks, or
// the cores that this process is bound to, if mpirun has dealt them out already. At least one.
int threads_per_rank(int ranks);

// Bytes of memory that this machine lets its processes have.
int64_t machine_memory();

}  // namespace moemamba
