#include "model/counts.h"

#include "model/language_model.h"

namespace moemamba {

ModelCounts count_model(const ModelSizes& sizes) {
  const ProcessGroups groups = make_planned_groups(RankLayout(1, 1, int(sizes.E)), 0);
  ParameterStore store(groups);
  const LanguageModel model(sizes, store, groups.layout, 0);
  ModelCounts counts;
  for (const Parameter& p : store.parameters()) {
    const int64_t elements = p.shape.elements();
    if (p.name.starts_with("embedding.") || p.name.starts_with("head.")) {
      counts.embedding_and_head += elements;
      continue;
    }
    counts.total += elements;
    counts.active += p.axis == Axis::expert_data ? elements / sizes.E * sizes.K : elements;
  }
  return counts;
}

}  // namespace moemamba
