#include "parallel/clocks.h"

#include <chrono>

namespace moemamba {

std::vector<ClockReading> compare_clocks(Communicator& group, int rounds,
                                         const std::function<double()>& clock) {
  using Steady = std::chrono::steady_clock;
  Stream stream = Stream::immediate();
  std::vector<double> shown(size_t(group.size()));
  std::vector<ClockReading> readings;
  for (int round = 0; round < rounds; ++round) {
    const double before = clock();
    const auto begin = Steady::now();
    barrier(group, stream);
    const double own = clock();
    group.all_gather(stream, &own, shown.data(), sizeof own);
    const double took = std::chrono::duration<double>(Steady::now() - begin).count();
    if (group.rank() != 0 || (!readings.empty() && took >= readings[0].round_trip)) continue;
    readings.clear();
    for (double there : shown)
      readings.push_back({.offset = there - (before + took / 2), .round_trip = took});
    readings[0].offset = 0;  // against itself
  }
  return readings;
}

}  // namespace moemamba
