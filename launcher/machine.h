#pragma once
#include <cstdint>
#include <string>

namespace moemamba {

// Threads of one rank when `ranks` of them share this machine: its cores by number of ranks, or
// the cores that this process is bound to, if mpirun has dealt them out already. At least one.
int threads_per_rank(int ranks);

// Bytes of memory that this machine lets its processes have.
int64_t machine_memory();

// What computes here.
struct Processors {
  std::string model;  // "AMD EPYC 9454"; "": not known
  int packages = 0, cores = 0, threads = 0;
  int usable_cores = 0;  // by this process, as it is bound and as its container allows
  int memory_nodes = 0;
};
Processors find_processors();

}  // namespace moemamba
