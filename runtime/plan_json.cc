#include <nlohmann/json.hpp>

#include "runtime/plan.h"

namespace moemamba {

namespace {

using Json = nlohmann::ordered_json;

Json bytes_json(const PlannedBytes& bytes) {
  const TrainerBytes& t = bytes.trainer;
  return {{"values", t.values},          {"masters", 0},
          {"gradients", t.gradients},    {"moments", t.moments},
          {"reduction", t.reduction},    {"activations", t.activations - bytes.exchange},
          {"exchange", bytes.exchange},  {"batch", t.batch},
          {"checkpoint", bytes.staging}, {"samples", bytes.samples},
          {"workspace", bytes.workspace}};
}

// Whole numbers as such, where a double holds them exactly.
Json whole(double number) {
  return number < 9e15 ? Json(int64_t(number)) : Json(number);
}

Json experts_json(const RankLayout& layout) {
  Json list = Json::array();
  for (int c = 0; c < layout.expert_size() && layout.experts() > 0; ++c)
    list.push_back({{"coordinate", c},
                    {"first", layout.first_expert(c)},
                    {"count", layout.experts_of(c)},
                    {"first_rank", c},
                    {"rank_step", layout.expert_size()},
                    {"ranks", layout.expert_data_size()}});
  return list;
}

Json remedy_json(const Plan& plan) {
  if (plan.remedy)
    return {{"ranks", plan.remedy->ranks},
            {"parallel.expert", plan.remedy->expert},
            {"train.micro_batch_size", plan.remedy->micro_batch}};
  if (!plan.fits() && plan.largest_micro_batch > 0)
    return {{"ranks", plan.layout.ranks()},
            {"parallel.expert", plan.layout.expert_size()},
            {"train.micro_batch_size", plan.largest_micro_batch}};
  return nullptr;
}

}  // namespace

std::string plan_json(const Plan& plan) {
  const int64_t total = plan.bytes.total();
  const Json json = {{"pattern", plan.options.sizes.pattern_text()},
                     {"parameters_total", plan.counts.total},
                     {"parameters_active", plan.counts.active},
                     {"embedding_and_head", plan.counts.embedding_and_head},
                     {"flops_per_token", whole(plan.flops_per_token())},
                     {"flops_per_token_products", whole(plan.product_flops())},
                     {"flops_per_token_attention", whole(plan.attention_flops())},
                     {"ranks", plan.layout.ranks()},
                     {"expert_ranks", plan.layout.expert_size()},
                     {"bytes_per_rank", total},
                     {"bytes", bytes_json(plan.bytes)},
                     {"scratch_estimate", plan.bytes.scratch},
                     {"memory_per_rank", plan.memory},
                     {"fits", plan.fits()},
                     {"bytes_over", std::max<int64_t>(0, total - plan.memory)},
                     {"micro_batch", plan.share.micro_batch},
                     {"micro_batches", plan.share.micro_batches},
                     {"largest_micro_batch", plan.largest_micro_batch},
                     {"fits_with", remedy_json(plan)},
                     {"wire_bytes_per_step",
                      {{"data", plan.wires.data.total()},
                       {"expert_data", plan.wires.expert_data.total()},
                       {"expert", plan.wires.expert.total()},
                       {"control", plan.wires.control}}},
                     {"experts_of_ranks", experts_json(plan.layout)},
                     {"weights_bytes", plan.weights_bytes},
                     {"checkpoint_bytes", plan.checkpoint_bytes},
                     {"tokens_per_step", plan.tokens_per_step()},
                     {"steps", plan.options.optimizer.steps},
                     {"tokens", whole(plan.tokens())},
                     {"flops", plan.flops_per_token() * plan.tokens()}};
  return json.dump(2) + "\n";
}

}  // namespace moemamba
