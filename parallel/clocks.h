#pragma once
#include <functional>
#include <vector>

#include "parallel/communicator.h"

namespace moemamba {

// What a member's clock was found to show against the first member's.
struct ClockReading {
  double offset = 0;      // seconds ahead of the first member's; right within round_trip / 2
  double round_trip = 0;  // of the messages between which it was read
};

// Of every member in order, on the first one; elsewhere nothing. `rounds` times: the first member
// says something to all, each of them reads its `clock` (seconds) upon that and says what it shows.
// So a reading lies between the first member's word and the answer's arrival, and the round that
// was fastest counts: one that was held up says little.
std::vector<ClockReading> compare_clocks(Communicator& group, int rounds,
                                         const std::function<double()>& clock);

}  // namespace moemamba
