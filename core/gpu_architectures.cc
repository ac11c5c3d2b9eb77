#include "core/gpu_architectures.h"

#include <algorithm>
#include <cstdlib>
#include <sstream>

namespace moemamba::gpu {

bool runs_on(const std::string& architectures, int capability) {
  std::istringstream words(architectures);
  for (std::string word; words >> word;) {
    char* rest = nullptr;
    const auto built = int(std::strtol(word.c_str(), &rest, 10));
    const std::string kind = rest;  // "", "a", "-real", "a-real", "-virtual", ...
    if (kind.starts_with("a")) {
      if (capability == built) return true;
      continue;
    }
    const bool cubin = kind != "-virtual", ptx = kind != "-real";
    if (cubin && capability / 10 == built / 10 && capability >= built) return true;
    if (ptx && capability >= built) return true;
  }
  return false;
}

std::string missing_kernels(const std::string& architectures, const std::vector<Facts>& gpus,
                            int ranks) {
  for (size_t i = 0; i < std::min(gpus.size(), size_t(ranks)); ++i) {
    const int capability = gpus[i].capability;
    if (!runs_on(architectures, capability))
      return concat("GPU ", i, ", ", gpus[i].name, ", has compute capability ", capability / 10,
                    ".", capability % 10, ", for which this build has no kernels (", architectures,
                    "); hide it with CUDA_VISIBLE_DEVICES, or build with ",
                    "-DCMAKE_CUDA_ARCHITECTURES=", capability);
  }
  return "";
}

}  // namespace moemamba::gpu
