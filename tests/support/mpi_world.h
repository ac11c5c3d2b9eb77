#pragma once
#include <vector>

#include "parallel/world.h"

namespace moemamba {

// How many of the ranks of mpirun failed, where each says 0 or 1; every rank gets the same answer.
inline int64_t agree_on_failures(World& world, int64_t failed) {
  const ProcessGroups groups =
      world.make_groups(RankLayout(world.size(), 1, 0), std::chrono::seconds(60));
  std::vector<int64_t> workspace(size_t(world.size()));
  Stream stream = Stream::immediate();
  all_reduce_sum(*groups.control, stream, view(&failed, {1}),
                 view(workspace.data(), {world.size()}));
  return failed;
}

}  // namespace moemamba
