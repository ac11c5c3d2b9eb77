#pragma once
#include <sys/types.h>

#include <set>
#include <string>

namespace moemamba {

// What Open MPI leaves on this machine when its processes are killed: session folders below the
// folder for temporary files, and segments of shared memory. Only what is known to belong to the
// job at hand is removed.
class Leftovers {
 public:
  // A rank of this machine, while it lives: its environment says where they are.
  void learn_from_rank(pid_t pid);
  void learn_from_launcher(pid_t pid);  // mpirun
  // REQUIRES: no process of the job is left. What cannot be removed stays.
  void remove();

 private:
  std::set<std::string> folders_, segments_;  // whole paths, the latter without a rank's number
};

}  // namespace moemamba
