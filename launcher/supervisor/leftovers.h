#pragma once
#include <sys/types.h>

#include <set>
#include <string>

#include "core/file.h"

namespace moemamba {

// What Open MPI leaves on this machine when its processes are killed: session folders below the
// folder for temporary files, and segments of shared memory. Only what is known to belong to the
// job at hand is removed.
class Leftovers {
 public:
  // A rank of this machine, while it lives: its environment says where they are.
  void learn_from_rank(pid_t pid);
  void learn_from_launcher(pid_t pid);  // mpirun
  // For a later attempt, which finds no process of this one any more: into a file, and from there.
  // What cannot be read is passed over.
  void save(FileSystem& files, const std::string& file) const;
  void learn_from_file(const std::string& file);
  void spare(const Leftovers& others);  // what is theirs stays
  // REQUIRES: no process of the job is left. What cannot be removed stays.
  void remove();

 private:
  std::set<std::string> folders_, segments_;  // whole paths, the latter without a rank's number
};

}  // namespace moemamba
