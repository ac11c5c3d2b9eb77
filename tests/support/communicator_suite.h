#pragma once
#include <functional>
#include <string>
#include <vector>

#include "parallel/communicator.h"

namespace moemamba {

// What every implementation of Communicator must do, as code that each rank runs with its own seat
// in a group made for this case alone. Throws where the promise is broken.
struct CommunicatorCase {
  std::string name;
  std::chrono::milliseconds deadline;
  std::function<void(Communicator&, Stream&)> run;
};

std::vector<CommunicatorCase> communicator_cases();

}  // namespace moemamba
