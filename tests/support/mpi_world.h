#pragma once
#include <cstdio>
#include <functional>
#include <vector>

#include "core/gpu.h"
#include "launcher/gpu_environment.h"
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

// The main() of a program whose ranks have a GPU each. body(world) returns how many ranks failed;
// it is not called where there are fewer GPUs than ranks, or one rank alone, which is said.
inline int run_on_gpus(const char* held, const std::function<int64_t(World&)>& body) {
  prepare_nccl_environment();
  World world;
  try {
    std::string why;
    const auto gpus = int64_t(gpu::devices(&why).size());
    if (world.size() == 1)
      why = "one rank alone: NCCL's groups have two at least";
    else if (agree_on_failures(world, gpus < world.node_size() ? 1 : 0) > 0)
      why = concat(world.node_size(), " ranks on a machine with ", gpus, " GPUs",
                   why.empty() ? "" : " (" + why + ")");
    else
      why.clear();
    if (!why.empty()) {
      std::printf("rank %d of %d: skipped: %s\n", world.rank(), world.size(), why.c_str());
      return 0;
    }
    world.choose_gpu("", std::chrono::seconds(60));
    if (const int64_t failed = body(world); failed > 0) {
      std::fprintf(stderr, "rank %d of %d: %d ranks failed\n", world.rank(), world.size(),
                   int(failed));
      world.abort(3);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "rank %d of %d: %s\n", world.rank(), world.size(), error.what());
    world.abort(3);
  }
  std::printf("rank %d of %d on %s: %s\n", world.rank(), world.size(), world.hostname().c_str(),
              held);
  return 0;
}

}  // namespace moemamba
