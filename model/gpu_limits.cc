#include "model/gpu_limits.h"

#include "core/schema.h"
#include "kernels/gpu_limits.h"

namespace moemamba {

void check_gpu_limits(const ModelSizes& s) {
  std::string problems;
  const auto require = [&](const char* setting, const char* what, int64_t found, int64_t most) {
    if (found > most)
      problems += concat(problems.empty() ? "" : "\n", setting, ": a GPU takes ", what,
                         " of up to ", most, ", found ", found, "; lower it, or set --device=CPU");
  };
  require("model.experts", "a number of experts", s.E, kMostExpertsOnGpu);
  require("model.width", "rows", s.D, kWidestNormOnGpu);
  const bool mamba = s.layers(LayerKind::mamba) + s.layers(LayerKind::inner_moe) > 0;
  if (mamba && s.mamba_norms) require("model.dt_rank", "normalised rows", s.R, kWidestNormOnGpu);
  if (s.layers(LayerKind::attention) > 0)
    require("model.head_width (model.width / model.heads where it is 0)", "heads", s.dh,
            kWidestHeadOnGpu);
  if (!problems.empty()) throw BadSettings(problems);
}

}  // namespace moemamba
