#pragma once
#include <sys/types.h>

#include <string>
#include <vector>

namespace moemamba {

// "cmdline", "comm" or "environ" of a process; "" where it is gone.
std::string words_of(pid_t id, const char* what);
// Living processes that were started with `mark` among their words (zombies have none).
std::vector<pid_t> processes_with(const std::string& mark);

// The processes of `moemamba train --ranks N`, all of which have `mark` among their words.
struct Processes {
  std::vector<pid_t> launchers;
  std::vector<pid_t> mpiruns;
  std::vector<pid_t> ranks;  // in the order of their numbers
};
Processes find_processes(const std::string& mark);

}  // namespace moemamba
