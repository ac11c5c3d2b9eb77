#pragma once
#include <chrono>
#include <string>
#include <vector>

namespace moemamba {

// What a command prints, on either channel if `errors_too`, until it ends or the time is over, when
// it is killed. A command that is not there prints nothing.
std::string output_of(const std::vector<std::string>& command,
                      std::chrono::steady_clock::time_point end, bool errors_too = false);

}  // namespace moemamba
