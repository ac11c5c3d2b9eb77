#pragma once
#include <string>
#include <vector>

#include "parallel/world.h"
#include "runtime/doctor_report.h"

namespace moemamba {

// The parts of `moemamba doctor`. None of them throws, and none waits for longer than its time:
// what may hang or crash (MPI, GPUs, disks) is looked at by a process of its own.

struct DoctorOptions {
  std::string run;  // folder whose disk is measured; it need not exist. "": the working directory
  int ranks = 0;    // that are to run on this host; 0: one a core
  std::string hostfile;
  std::string mark;   // a file that the first host has left in `run`: is it the same folder?
  std::string probe;  // what a process of its own is to look at
  bool json = false;
};

// Each adds its checks, and to `facts` what is compared between hosts.
void check_build(HostReport& report);
void check_machine(const DoctorOptions& options, HostReport& report);
void check_limits(const DoctorOptions& options, HostReport& report);
void check_network(HostReport& report);
void check_mpi(HostReport& report);
void check_gpus(const DoctorOptions& options, HostReport& report);
void check_disk(const DoctorOptions& options, HostReport& report);

// The processes of their own: what they print, and their exit code.
int probe_threads();
int probe_ranks();
int probe_clocks();
int probe_gpus();
int probe_disk(const DoctorOptions& options);
// This program as one of those, for ask().
std::vector<std::string> probe_words(const std::string& probe);
// What it reports, within `seconds`; else one check `name` that fails, with what was seen.
HostReport ask_probe(const std::string& probe, const std::vector<std::string>& more, double seconds,
                     const std::string& name);

HostReport examine_host(const DoctorOptions& options);
HostsReport examine_hosts(const DoctorOptions& options);

// Where the folder of a run lies, or would be made: itself, or the nearest above it that is there.
std::string nearest_folder(const std::string& run);

// "2.1.0" of a text with a version in it; "": none.
std::string version_in(const std::string& text);
// What `nvidia-smi topo -m` says of pairs of GPUs, in one line: "NV18 between all 8"; "": nothing.
std::string gpu_links(const std::string& topology);

std::string bytes_text(double bytes);  // "1.5 GiB"

}  // namespace moemamba
