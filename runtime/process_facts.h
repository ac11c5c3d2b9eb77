#pragma once
#include <cstdint>
#include <string>

namespace moemamba {

// What tells one process from another that has its number later. Read from /proc.

// Ticks between the boot and the start of a process; 0: there is no such process, or a dead one.
int64_t process_start(int64_t pid);
// As /proc has it: 'R' runs, 'S' sleeps, 'T' is stopped, 'Z' is dead, ...; 0: there is none.
char process_state(int64_t pid);
std::string boot_id();  // of this machine since it was started

}  // namespace moemamba
