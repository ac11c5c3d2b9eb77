#include <algorithm>

#include "runtime/plan.h"

namespace moemamba {

namespace {

// The options with micro-batches of `groups` routing groups.
TrainerOptions with_groups(const TrainerOptions& options, int64_t groups) {
  TrainerOptions with = options;
  with.micro_batch = groups * options.routing_group;
  return with;
}

// What weighs most on a rank, and which settings make it less.
Obstacle describe(const PlannedBytes& bytes, const RankLayout& layout) {
  const TrainerBytes& t = bytes.trainer;
  Obstacle worst{.ranks = layout.ranks(),
                 .expert = layout.expert_size(),
                 .total = bytes.total(),
                 .what = "values and gradients of the layers that every rank holds whole",
                 .bytes = 2 * bytes.dense,
                 .reduce = "model.width, model.blocks or model.vocabulary"};
  const auto consider = [&](const char* what, int64_t size, const char* reduce) {
    if (size > worst.bytes) worst.what = what, worst.bytes = size, worst.reduce = reduce;
  };
  consider("values and gradients of one rank's experts", 2 * (t.values - bytes.dense),
           "model.expert_hidden, model.width or model.blocks");
  consider("activations of one routing group", t.activations,
           "train.routing_group, train.sequence_length or parallel.exchange_rows");
  consider("the copy that a rank's part of a checkpoint is written from", bytes.staging,
           "model.width, model.blocks or model.experts");
  consider("the buffer that reduces the largest block's gradients", t.reduction,
           "model.width or model.vocabulary");
  return worst;
}

}  // namespace

int64_t largest_micro_batch(const TrainerOptions& options, const RankLayout& layout,
                            int64_t memory) {
  const int64_t groups = options.data.global_batch / options.routing_group;
  const int64_t share = (groups + layout.ranks() - 1) / layout.ranks();
  const int64_t rows_of_group =
      options.routing_group * options.data.sequence_length * std::max<int64_t>(1, options.sizes.K);
  const auto fits = [&](int64_t count) {
    return planned_bytes(with_groups(options, count), layout).total() <= memory;
  };
  // fits(low) holds (0: nothing to hold), fits(high) does not.
  int64_t low = 0, high = std::min(share, kMostPlannedRows / rows_of_group) + 1;
  if (high > 1 && fits(high - 1)) low = high - 1;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (fits(middle) ? low : high) = middle;
  }
  return low * options.routing_group;
}

std::optional<Remedy> find_layout(const TrainerOptions& options, const RankLayout& layout,
                                  int64_t memory, std::optional<Obstacle>& obstacle) {
  const TrainerOptions smallest = with_groups(options, 1);
  const int most = std::max(1, layout.experts());
  for (int ranks = layout.ranks(); ranks <= kMostPlannedRanks; ranks *= 2)
    for (int expert = 1; expert <= std::min(ranks, most); ++expert) {
      if (ranks % expert != 0) continue;
      const RankLayout other(ranks, expert, layout.experts());
      const PlannedBytes bytes = planned_bytes(smallest, other);
      if (bytes.total() <= memory)
        return Remedy{ranks, expert, largest_micro_batch(options, other, memory)};
      if (!obstacle || bytes.total() < obstacle->total) obstacle = describe(bytes, other);
    }
  return std::nullopt;
}

}  // namespace moemamba
