#include "runtime/plan.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "core/schema.h"
#include "runtime/checkpoint_shard.h"
#include "runtime/samples.h"

namespace moemamba {

namespace {

constexpr int kFullestRank = 0;

// A rank with everything in place and no memory.
class PlannedRank {
 public:
  PlannedRank(const TrainerOptions& options, const RankLayout& layout)
      : options_(options),
        groups_(planned_groups(options, layout)),
        share_(share_of_batch(options.data.global_batch, options.routing_group, options.micro_batch,
                              kFullestRank, layout.ranks())),
        session_(groups_, options.sizes, 1, share_.micro_batch, options.data.sequence_length,
                 options.exchange_rows, Session::Memory::planned_training) {}
  PlannedBytes bytes();
  PlannedWires wires() const;

 private:
  static ProcessGroups planned_groups(const TrainerOptions& options, const RankLayout& layout) {
    ProcessGroups groups = make_planned_groups(layout, kFullestRank);
    groups.device = options.device;
    return groups;
  }
  int64_t tokens() const;  // of the busiest rank in a step
  void add_exchange(PlannedWires::Exchange& sum, int64_t in, int64_t out) const;

  const TrainerOptions& options_;
  ProcessGroups groups_;
  BatchShare share_;
  Session session_;
};

// Operators share one buffer, as large as the largest of them needs: the logits of some hundred
// tokens (kernels/cpu/cross_entropy.cc), a norm's sums for every 64 rows (norm.cc), or the parts of
// db and dc that groups of 128 channels add up in the backward scan (scan.cc).
int64_t scratch_estimate(const ModelSizes& s, int64_t tokens) {
  const int64_t logits = std::max<int64_t>(int64_t{8} << 20, 256 * 4 * s.V);
  const int64_t norm = (tokens + 63) / 64 * 2 * s.D * 4;
  const bool scans = s.layers(LayerKind::mamba) + s.layers(LayerKind::inner_moe) > 0;
  const int64_t groups = (s.I + 127) / 128;
  return std::max({logits, norm, scans && groups > 1 ? groups * tokens * s.N * 8 : 0});
}

// On a GPU likewise: logits of a chunk of tokens (kernels/cuda/cross_entropy.cu), db and dc of the
// backward scan's channel blocks (scan_backward.cu), the router's rows widened to f32 (matmul.cu);
// two streams' workspaces of cuBLASLt, and what the driver and its libraries hold.
int64_t gpu_workspace(const ModelSizes& s, int64_t tokens) {
  constexpr int64_t kLibraries = int64_t{640} << 20;
  const bool scans = s.layers(LayerKind::mamba) + s.layers(LayerKind::inner_moe) > 0;
  const int64_t logits = std::min<int64_t>(tokens * s.V * 4, int64_t{256} << 20);
  return kLibraries + std::max({logits, scans ? (s.I + 63) / 64 * tokens * s.N * 8 : 0,
                                s.E > 0 ? tokens * s.D * 4 : 0});
}

// Tensors that the exchange reads or writes are called so.
bool belongs_to_exchange(const char* who) {
  return std::string_view(who).starts_with("exchange ");
}

PlannedBytes PlannedRank::bytes() {
  PlannedBytes planned;
  const std::vector<GradientBuckets::Bucket> buckets = session_.store.buckets();
  const ParameterStore::Bytes store = session_.store.bytes();
  planned.trainer = {
      .values = store.values,
      .gradients = store.gradients,
      .moments = store.moments,
      .reduction = GradientBuckets::buffer_bytes(buckets),
      .activations = session_.activation_bytes,
      .batch = step_buffers(options_, share_.micro_batch, groups_.layout.ranks()).bytes()};
  for (const GradientBuckets::Bucket& bucket : buckets)
    if (bucket.group == groups_.data.get()) planned.dense += bucket.value.bytes();
  std::vector<Arena::Taken>& largest = planned.largest;
  for (const Arena::Taken& taken : session_.arena.at_peak()) {
    if (belongs_to_exchange(taken.who)) planned.exchange += taken.bytes;
    const auto same = std::ranges::find_if(
        largest, [&](const Arena::Taken& other) { return std::strcmp(other.who, taken.who) == 0; });
    if (same == largest.end())
      largest.push_back(taken);
    else
      same->bytes += taken.bytes;
  }
  std::ranges::stable_sort(largest, std::greater(), &Arena::Taken::bytes);
  planned.staging = staging_bytes(written_pieces(session_.store));
  if (options_.sample_tokens > 0)
    planned.samples =
        Decoder::planned_bytes(session_, sample_room(options_.sample_tokens, session_.length));
  const int64_t tokens = share_.micro_batch * session_.length;
  planned.scratch = scratch_estimate(options_.sizes, tokens);
  if (options_.device == DeviceKind::cuda) {
    planned.staging = planned.scratch = 0;
    planned.workspace = gpu_workspace(options_.sizes, tokens);
  }
  return planned;
}

// A rank's slice of every bucket goes to and comes from every other rank of the bucket's group.
PlannedWires PlannedRank::wires() const {
  PlannedWires wires;
  for (const GradientBuckets::Bucket& bucket : session_.store.buckets()) {
    const int64_t N = bucket.group->size(), sent = bucket.value.bytes() / N * (N - 1);
    const bool dense = bucket.group == groups_.data.get();
    PlannedWires::Gradients& sum = dense ? wires.data : wires.expert_data;
    sum.reduce_scatter += sent;
    sum.all_gather += sent;
  }
  const ModelSizes& s = options_.sizes;
  for (int64_t i = 0; i < s.layers(LayerKind::moe); ++i) add_exchange(wires.expert, s.D, s.D);
  for (int64_t i = 0; i < s.layers(LayerKind::inner_moe); ++i)
    for (int p = 0; p < 3; ++p) {
      const bool back = p == ModelConfig::OUTPUT;
      if (s.projection_experts[p]) add_exchange(wires.expert, back ? s.I : s.D, back ? s.D : s.I);
    }
  const int64_t others = groups_.layout.ranks() - 1;
  wires.control = step_buffers(options_, 0, 1).facts * others;
  return wires;
}

int64_t PlannedRank::tokens() const {
  const int64_t groups = options_.data.global_batch / options_.routing_group;
  const int ranks = groups_.layout.ranks();
  return (groups + ranks - 1) / ranks * options_.routing_group * session_.length;
}

// One mixture of experts: rows of `in` numbers go out, rows of `out` numbers come back.
void PlannedRank::add_exchange(PlannedWires::Exchange& sum, int64_t in, int64_t out) const {
  const ModelSizes& s = options_.sizes;
  const RankLayout& layout = groups_.layout;
  const double M = layout.expert_size(), held = double(layout.experts_of(0)) / double(s.E);
  const double kept = s.capacity_factor > 0 ? std::min(1.0, s.capacity_factor) : 1.0;
  const double rows = double(tokens() * s.K) * kept;
  const double sent = rows * (1 - held);          // to the others' experts
  const double returned = rows * (M - 1) * held;  // to their owners
  const auto row_bytes = [&](int64_t width) {
    return double((width * size_of(s.compute) + 15) / 16 * 16);
  };
  const double in_bytes = row_bytes(in), out_bytes = row_bytes(out);
  // Rows beyond the exchange's capacity travel a second time in backward.
  const double received = rows * M * held / double(share_.micro_batches);
  const double again = std::max(0.0, 1 - double(session_.exchange.capacity()) / received);
  sum.dispatch += int64_t(sent * in_bytes);
  sum.combine += int64_t(returned * out_bytes);
  sum.dispatch_backward += int64_t(sent * (out_bytes + again * in_bytes));
  sum.combine_backward += int64_t(returned * in_bytes);
  sum.counts += share_.micro_batches * (s.E + 1) * 4 * (layout.expert_size() - 1);
}

// Sums of bytes stay below 2^63.
void check_countable(const TrainerOptions& options, const ModelCounts& counts,
                     const BatchShare& share) {
  constexpr double kMostParameters = 1e17;
  const double parameters = double(counts.total) + double(counts.embedding_and_head);
  const int64_t L = options.data.sequence_length;
  const int64_t rows = std::max<int64_t>(1, options.sizes.K);
  if (parameters > kMostParameters)
    throw BadSettings(concat("model: ", parameters, " parameters are more than can be planned (",
                             kMostParameters,
                             "); take a lower model.width, model.blocks or "
                             "model.experts"));
  if (share.micro_batch * L * rows > kMostPlannedRows)
    throw BadSettings(concat("train.micro_batch_size: ", share.micro_batch, " sequences of ", L,
                             " tokens, each for ", rows,
                             " experts, are more than the 2^31 rows "
                             "that a micro-batch may have; take at most ",
                             std::max<int64_t>(1, kMostPlannedRows / (L * rows)), " sequences"));
}

int64_t state_elements(const ModelSizes& s) {
  return s.router_bias_rate > 0 ? s.routers() * s.E : 0;
}

}  // namespace

void check_gpu_memory(const TrainerOptions& options, const RankLayout& layout, int64_t free) {
  TrainerOptions there = options;
  there.device = DeviceKind::cuda;
  const PlannedBytes bytes = planned_bytes(there, layout);
  if (bytes.total() <= free) return;
  const auto gib = [](int64_t count) {
    char text[32];
    std::snprintf(text, sizeof text, "%.2f GiB", double(count) / double(1 << 30));
    return std::string(text);
  };
  const TrainerBytes& t = bytes.trainer;
  std::string parts = concat("values ", gib(t.values), ", gradients ", gib(t.gradients),
                             ", moments ", gib(t.moments), ", activations ", gib(t.activations),
                             ", reduction ", gib(t.reduction), ", workspace ",
                             gib(bytes.workspace));
  for (size_t i = 0; i < std::min<size_t>(3, bytes.largest.size()); ++i)
    parts += concat(i == 0 ? "; largest activations: " : ", ", bytes.largest[i].who, " ",
                    gib(bytes.largest[i].bytes));
  const int64_t fits = largest_micro_batch(there, layout, free);
  throw Error(concat("the training does not fit this rank's GPU: it takes ", gib(bytes.total()),
                     ", ", gib(free), " are free (", parts, "); ",
                     fits > 0 ? concat("the largest train.micro_batch_size that fits is ", fits)
                              : std::string("not even one routing group fits; ask `moemamba plan "
                                            "--device=CUDA` for a layout that does")));
}

PlannedBytes planned_bytes(const TrainerOptions& options, const RankLayout& layout) {
  return PlannedRank(options, layout).bytes();
}

Plan make_plan(const TrainerOptions& options, const RankLayout& layout, int64_t memory) {
  const int64_t groups = options.data.global_batch / options.routing_group;
  Plan plan{
      .options = options,
      .layout = layout,
      .counts = count_model(options.sizes),
      .memory = memory,
      .share = share_of_batch(options.data.global_batch, options.routing_group, options.micro_batch,
                              kFullestRank, layout.ranks()),
      .most_sequences = (groups + layout.ranks() - 1) / layout.ranks() * options.routing_group,
      .idle_ranks = std::max<int64_t>(0, layout.ranks() - groups)};
  check_countable(options, plan.counts, plan.share);
  PlannedRank rank(plan.options, layout);
  plan.bytes = rank.bytes();
  plan.wires = rank.wires();
  const int64_t trained = plan.counts.total + plan.counts.embedding_and_head;
  plan.weights_bytes = 4 * (trained + state_elements(options.sizes));
  plan.checkpoint_bytes = plan.weights_bytes + 8 * trained;
  plan.largest_micro_batch = largest_micro_batch(options, layout, memory);
  if (!plan.fits() && plan.largest_micro_batch == 0)
    plan.remedy = find_layout(options, layout, memory, plan.obstacle);
  return plan;
}

}  // namespace moemamba
