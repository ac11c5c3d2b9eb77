#pragma once
#include <string>
#include <vector>

#include "parallel/communicator.h"

namespace moemamba {

// What every member says, in order of rank, on the group's first member (elsewhere: nothing). The
// host waits. For control messages outside a step.
std::vector<std::string> gather_blobs(Communicator& group, Stream& stream, const std::string& own);

// What the first member says, on every member. The host waits.
std::string broadcast_blob(Communicator& group, Stream& stream, const std::string& own);

}  // namespace moemamba
