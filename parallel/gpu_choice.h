#pragma once
#include <string>
#include <vector>

namespace moemamba {

// What one rank sees of its machine.
struct SeenGpus {
  std::string hostname;
  std::string visible;            // CUDA_VISIBLE_DEVICES; "" where it is not set
  std::vector<std::string> gpus;  // what tells each from all others of the world, in CUDA's order
};

// Which of the GPUs that it sees each rank takes, so that no two take the same: ranks that see the
// same GPUs take them in turn, and one that alone sees its GPUs (a launcher that gives every rank
// its own) takes the first. An Error where there are too few.
std::vector<int> choose_gpus(const std::vector<SeenGpus>& of_ranks);

// "2 x H100, 1 x A100: different GPUs, of which the slowest sets the pace"; of each rank's GPU.
std::string gpu_kinds_text(const std::vector<std::string>& of_ranks);

}  // namespace moemamba
