#include "parallel/gpu_choice.h"

#include <map>

#include "core/error.h"

namespace moemamba {

std::vector<int> choose_gpus(const std::vector<SeenGpus>& of_ranks) {
  std::map<std::vector<std::string>, int> ranks_of;  // by all that they see
  for (const SeenGpus& seen : of_ranks) ++ranks_of[seen.gpus];
  std::map<std::vector<std::string>, int> next;
  std::map<std::string, size_t> taken;  // by which rank
  std::vector<int> chosen;
  for (size_t rank = 0; rank < of_ranks.size(); ++rank) {
    const SeenGpus& seen = of_ranks[rank];
    const int ranks = ranks_of[seen.gpus], gpus = int(seen.gpus.size());
    const std::string hidden =
        seen.visible.empty() ? "" : " (CUDA_VISIBLE_DEVICES=" + seen.visible + ")";
    check(ranks <= gpus, ranks, " ranks were started on ", seen.hostname, ", which has ", gpus,
          gpus == 1 ? " GPU" : " GPUs", hidden, "; start ", gpus, gpus == 1 ? " rank" : " ranks",
          " per node, or use --device=cpu");
    chosen.push_back(next[seen.gpus]++);
    const auto [other, first] = taken.emplace(seen.gpus[size_t(chosen.back())], rank);
    check(first, "ranks ", other->second, " and ", rank, " on ", seen.hostname,
          " would take the same GPU: of what they see", hidden, " a part is the same; show every ",
          "rank all GPUs, or each its own");
  }
  return chosen;
}

std::string gpu_kinds_text(const std::vector<std::string>& of_ranks) {
  std::map<std::string, int> kinds;
  for (const std::string& name : of_ranks) ++kinds[name];
  std::string text;
  for (const auto& [name, count] : kinds)
    text += concat(text.empty() ? "" : ", ", count, " x ", name);
  if (kinds.size() > 1) text += ": different GPUs, of which the slowest sets the pace";
  return text;
}

}  // namespace moemamba
