#pragma once
#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

namespace moemamba {

// Processes of a run that are left over from earlier attempts, found by what stands in the
// environment that they were started with. Only those of this machine and user are seen.

constexpr const char* kJobVariable = "MOEMAMBA_JOB";                // the attempt: 32 hex digits
constexpr const char* kRunKeyVariable = "MOEMAMBA_RUN_KEY";         // the run, whatever the attempt
constexpr const char* kSupervisorVariable = "MOEMAMBA_SUPERVISOR";  // <run>/supervisor

struct ProcessMark {
  std::vector<std::string> has;    // "NAME=value", all of them
  std::vector<std::string> lacks;  // "NAME=value", none of them
};

struct FoundProcess {
  pid_t pid = 0;
  int64_t started = 0;  // runtime/process_facts.h
  std::string program;  // its name in the process table
};

// Living processes that bear the mark, without this one. A zombie is dead.
std::vector<FoundProcess> marked_processes(const ProcessMark& mark);

struct Swept {
  std::vector<FoundProcess> killed, left;  // left: still there when the time was over
};
// SIGKILL to all of them, again to those that appear meanwhile, until none is there. REQUIRES:
// mark.has is not empty.
Swept sweep_processes(const ProcessMark& mark, std::chrono::milliseconds time);

// For messages: "moemamba (pid 12), mpirun (pid 11)".
std::string describe(const std::vector<FoundProcess>& processes);

}  // namespace moemamba
