#pragma once
#include <sys/types.h>

#include <string>
#include <vector>

namespace moemamba {

// Machines on this machine: network namespaces on a bridge, each with an address, a host name and a
// folder for temporary files of its own. They share the disks. Host 0 is where a supervisor or an
// mpirun is started; it reaches the others as Open MPI reaches machines by ssh, through a script
// that starts a command there with nothing of the caller's environment.
//
// The destructor kills all that runs on them and removes them, and the constructor those whose
// process died before its destructor. Names are unique, so tests may run beside each other.
class Hosts {
 public:
  // Why there can be none here: one sentence; empty: there can.
  static std::string cannot_be_made();

  // Scripts, temporary files and the like go to a folder `hosts` below `folder`. slots: ranks that
  // each takes, for hostfile(). An Error where they cannot be made after all.
  Hosts(const std::string& folder, int hosts, int slots);
  ~Hosts();
  Hosts(const Hosts&) = delete;
  Hosts& operator=(const Hosts&) = delete;

  int count() const { return count_; }
  std::string name(int host) const;     // "h0": its host name, known to all of them
  std::string address(int host) const;  // "10.77.0.1"
  std::string hostfile() const;         // path: all of them, as mpirun's --hostfile
  // Words for a shell before those of a command: it runs on that host, with what Open MPI needs to
  // reach the others, and has the process's number of the shell's child.
  std::string on(int host) const;

  // The cable of a host is out, or in again.
  void cut(int host);
  void mend(int host);
  bool is_cut(int host) const;

  // All that runs there, or only what has this name ("orted"). A zombie runs no more.
  std::vector<pid_t> processes(int host, const std::string& program = "") const;

 private:
  void make();
  void make_host(int host);
  void write_agent() const;
  std::string space(int host) const;  // name of its namespace; -1: the bridge's
  std::string folder_, prefix_;
  int count_, slots_;
};

}  // namespace moemamba
