#pragma once
#include <string>
#include <vector>

namespace moemamba {

// A stack as a rank has sent it, a line for each frame: "file+0xoffset" with the function's name
// and line, where addr2line is there, the file is on this machine, and it answers within seconds.
std::string stack_text(const std::vector<std::string>& frames, double most_seconds);

}  // namespace moemamba
