#pragma once
#include <optional>
#include <string>
#include <vector>

#include "launcher/supervisor/recovery.h"

namespace moemamba {

// Machines, and how this one is reached from them.

std::string this_host();
// Whether two names mean one machine: they are equal, with or without their domains.
bool same_host(const std::string& a, const std::string& b);
bool is_this_host(const std::string& name);

// A file as mpirun's --hostfile has it: a name a line, with slots=N. BadSettings where it cannot be
// read.
std::vector<HostSlots> read_hostfile(const std::string& path);
std::string hostfile_text(const std::vector<HostSlots>& hosts);

// What Slurm has given to this job.
struct Allocation {
  int ranks = 0;                 // --ntasks, or what its machines take; 0: it was not told
  std::vector<HostSlots> hosts;  // empty: Slurm's tools did not say which
  // Of srun, so that the ranks find each other and a step need not wait until the one before is
  // wholly gone. Empty: it cannot start such ranks.
  std::vector<std::string> srun_options;
};
std::optional<Allocation> slurm_allocation();
// SLURM_TASKS_PER_NODE: "8(x2),4" is 8, 8, 4. Empty where it is no such list.
std::vector<int> tasks_per_node(const std::string& text);

// What to bind: `wanted` if it is not empty; 127.0.0.1 where all hosts are this one; else the
// address from which this machine reaches the first of the others.
std::string control_address(const std::string& wanted, const std::vector<HostSlots>& hosts);

}  // namespace moemamba
