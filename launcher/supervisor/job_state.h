#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/file.h"
#include "launcher/supervisor/recovery.h"

namespace moemamba {

// What a supervisor that is started again has to know of the one before:
// <run>/supervisor/state.json.
struct JobState {
  bool running = false;          // false: its supervisor has seen its end
  bool resumes = false;          // that end was exit code 75: the same command is to go on
  std::string job;               // the attempt: 32 hex digits
  int64_t attempt = 0;           // counted from 1
  std::string host, boot_id;     // where mpirun is
  int64_t pid = 0, started = 0;  // of mpirun
  int ranks = 0, expert = 1;
  int64_t steps_lost = 0;
  int64_t step_limit_ms = 0;         // without progress in a step, for a hang; 0: none has ended
  std::vector<std::string> command;  // of every rank, and how many were asked for
  RecoveryMemory memory;
};
void write_job_state(FileSystem& files, const std::string& folder, const JobState& state);
// Nothing where there is none, or none that can be read.
std::optional<JobState> read_job_state(const std::string& folder);

}  // namespace moemamba
