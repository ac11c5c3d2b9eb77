#pragma once

namespace moemamba {

// Threads of one rank when `ranks` of them share this machine: its cores by number of ranks, or
// the cores that this process is bound to, if mpirun has dealt them out already. At least one.
int threads_per_rank(int ranks);

}  // namespace moemamba
