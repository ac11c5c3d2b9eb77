#include "launcher/plan_text.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>

namespace moemamba {

namespace {

std::string number(const char* format, double value) {
  std::array<char, 64> text{};
  std::snprintf(text.data(), text.size(), format, value);
  return text.data();
}

std::string bytes_text(int64_t bytes) {
  static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  double value = double(bytes);
  size_t unit = 0;
  for (; value >= 1024 && unit + 1 < std::size(kUnits); ++unit) value /= 1024;
  return number(unit == 0 ? "%.0f " : "%.2f ", value) + kUnits[unit];
}

// "545.2 M", "1.07 TFLOP"
std::string count_text(double value, const char* of = "") {
  static constexpr const char* kUnits[] = {"", "k", "M", "G", "T", "P", "E", "Z", "Y"};
  size_t unit = 0;
  for (; value >= 1000 && unit + 1 < std::size(kUnits); ++unit) value /= 1000;
  const char* format = unit == 0 ? "%.0f" : value < 10 ? "%.2f" : value < 1e4 ? "%.1f" : "%.3g";
  return concat(number(format, value), unit > 0 || *of ? " " : "", kUnits[unit], of);
}

std::string line(std::string_view name, const std::string& text) {
  std::string padded(name);
  padded.resize(std::max<size_t>(12, name.size() + 1), ' ');
  return padded + text + "\n";
}

// A row of a table: name, amount, remark.
std::string row(std::string_view name, int64_t bytes, const std::string& remark = "") {
  std::string padded = "  " + std::string(name);
  padded.resize(std::max<size_t>(36, padded.size() + 1), ' ');
  std::string amount = bytes_text(bytes);
  amount.insert(0, 12 - std::min<size_t>(12, amount.size()), ' ');
  return padded + amount + (remark.empty() ? "" : "   " + remark) + "\n";
}

std::string model_text(const Plan& plan) {
  const ModelSizes& s = plan.options.sizes;
  const auto total = double(plan.counts.total), active = double(plan.counts.active);
  const auto rest = double(plan.counts.embedding_and_head);
  const auto flops = [](double value) { return count_text(value, "FLOP"); };
  return line("model", concat(s.blocks, " blocks of (", s.pattern_text(), "), ",
                              s.E ? concat(s.E, " experts x top-", s.K, ", ") : "", "width ", s.D,
                              ", vocabulary ", s.V)) +
         line("parameters", concat(count_text(total), " (", plan.counts.total, "), active ",
                                   count_text(active), " (", plan.counts.active, ")")) +
         line("", concat("with embedding and head ", count_text(total + rest), ", active ",
                         count_text(active + rest))) +
         line("compute", concat(flops(plan.flops_per_token()), " per token, forward and backward: ",
                                "products ", flops(plan.product_flops()), ", attention ",
                                flops(plan.attention_flops()))) +
         line("", concat(flops(plan.flops_per_token() * double(plan.tokens_per_step())),
                         " per step, ", flops(plan.flops_per_token() * plan.tokens()), " in all"));
}

std::string run_text(const Plan& plan) {
  const BatchShare& share = plan.share;
  std::string text =
      line("run", concat(plan.options.optimizer.steps, " steps of ", plan.options.data.global_batch,
                         " x ", plan.options.data.sequence_length, " = ", plan.tokens_per_step(),
                         " tokens: ", count_text(plan.tokens()), " tokens")) +
      line("batch",
           concat("sequences per rank ", plan.most_sequences, " at most, in micro-batches of ",
                  share.micro_batch, ": ", share.micro_batches, " per step"));
  if (plan.idle_ranks > 0)
    text += line("", concat("ranks without any: ", plan.idle_ranks,
                            "; the batch has as many shares "
                            "as routing groups, lower train.routing_group"));
  return text;
}

// "experts 0-10 on coordinate 0 (ranks 0, 4, ...)"
std::string layout_text(const Plan& plan) {
  const RankLayout& layout = plan.layout;
  if (layout.experts() == 0) return line("ranks", concat(layout.ranks()));
  std::string text = line("ranks", concat(layout.ranks(), "; experts over ", layout.expert_size(),
                                          " of them (parallel.expert)"));
  for (int c = 0; c < layout.expert_size();) {
    constexpr int kShown = 8;  // coordinates, before the rest is left out
    const int first = layout.first_expert(c), last = layout.first_expert(c + 1) - 1;
    const std::string who =
        first == last ? concat("expert ", first) : concat("experts ", first, "-", last);
    std::string ranks = concat(layout.expert_data_size() > 1 ? "ranks " : "rank ", c);
    if (layout.expert_data_size() > 1) ranks += concat(", ", c + layout.expert_size());
    if (layout.expert_data_size() > 2) ranks += ", ...";
    text += line(c == 0 ? "experts" : "", concat(who, " on coordinate ", c, " (", ranks, ")"));
    const bool many = layout.expert_size() > kShown && c == kShown - 2;
    if (many) text += line("", "...");
    c = many ? layout.expert_size() - 1 : c + 1;
  }
  return text;
}

std::string memory_text(const Plan& plan) {
  const TrainerBytes& t = plan.bytes.trainer;
  std::string text = "\nmemory of rank 0, the fullest\n" + row("values", t.values) +
                     row("masters", 0, "the values are f32") + row("gradients", t.gradients) +
                     row("moments", t.moments, "of the slices that it owns") +
                     row("reduction buffer", t.reduction) +
                     row("activations", t.activations - plan.bytes.exchange) +
                     row("exchange buffers", plan.bytes.exchange) +
                     row("batch and facts", t.batch) +
                     row("checkpoint", plan.bytes.staging, "the copy that is written") +
                     (plan.bytes.samples > 0 ? row("sample texts", plan.bytes.samples) : "") +
                     (plan.bytes.workspace > 0
                          ? row("workspace", plan.bytes.workspace, "operators and libraries, about")
                          : "") +
                     row("total", plan.bytes.total());
  text += "\nlargest activations and exchange buffers\n";
  constexpr size_t kShown = 8;
  for (size_t i = 0; i < std::min(kShown, plan.bytes.largest.size()); ++i)
    text += row(plan.bytes.largest[i].who, plan.bytes.largest[i].bytes);
  return text;
}

std::string wires_text(const Plan& plan) {
  const PlannedWires& w = plan.wires;
  const auto parts = [](const char* a, int64_t first, const char* b, int64_t second) {
    return concat(a, bytes_text(first), b, bytes_text(second));
  };
  const auto gradients = [&](std::string_view name, const PlannedWires::Gradients& sum) {
    return row(name, sum.total(),
               parts("reduce-scatter ", sum.reduce_scatter, ", all-gather ", sum.all_gather));
  };
  return "\nsent by a rank per step, tokens spread evenly over the experts\n" +
         gradients("data", w.data) + gradients("expert_data", w.expert_data) +
         row("expert, forward", w.expert.dispatch + w.expert.combine,
             parts("dispatch ", w.expert.dispatch, ", combine ", w.expert.combine)) +
         row("expert, backward", w.expert.dispatch_backward + w.expert.combine_backward,
             parts("dispatch ", w.expert.dispatch_backward, ", combine ",
                   w.expert.combine_backward)) +
         row("expert, counts of rows", w.expert.counts) +
         row("control", w.control, "losses and verdicts: negligible");
}

std::string verdict_text(const Plan& plan) {
  const int64_t total = plan.bytes.total();
  const std::string memory = bytes_text(plan.memory);
  const std::string largest =
      concat(plan.largest_micro_batch, " sequences",
             plan.largest_micro_batch == plan.most_sequences ? " (a rank's whole share)" : "");
  if (plan.fits())
    return line("fits", concat(bytes_text(total), " of ", memory, " per rank")) +
           line("", concat("the largest micro-batch that fits: ", largest));
  std::string text =
      line("does not fit", concat(bytes_text(total), " per rank, but it has ", memory, ": ",
                                  bytes_text(total - plan.memory), " too much"));
  if (plan.largest_micro_batch > 0)
    return text +
           line("it fits with", concat("--train.micro_batch_size=", plan.largest_micro_batch));
  if (plan.remedy)
    return text +
           line("it fits with", concat("--ranks ", plan.remedy->ranks, " of ", memory,
                                       " each, --parallel.expert=", plan.remedy->expert,
                                       " --train.micro_batch_size=", plan.remedy->micro_batch));
  const Obstacle& o = *plan.obstacle;
  return text +
         line("", concat("no number of ranks up to ", kMostPlannedRanks, " helps: with ", o.ranks,
                         " ranks and --parallel.expert=", o.expert)) +
         line("", concat("a rank still takes ", bytes_text(o.total), ", of it ",
                         bytes_text(o.bytes), " are")) +
         line("", concat(o.what, "; reduce ", o.reduce));
}

}  // namespace

std::string plan_text(const Plan& plan) {
  return model_text(plan) + run_text(plan) + layout_text(plan) + memory_text(plan) +
         wires_text(plan) + "\n" +
         line("on disk",
              concat("weights ", bytes_text(plan.weights_bytes),
                     "; a checkpoint with both moments ", bytes_text(plan.checkpoint_bytes))) +
         verdict_text(plan) +
         line("not counted", concat("operators' scratch (about ", bytes_text(plan.bytes.scratch),
                                    "), the program, its libraries and MPI"));
}

int64_t read_bytes(const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  const std::string unit(end);
  static constexpr std::string_view kLetters = "KMGT";
  double scale = 1;
  if (!unit.empty() && unit != "B") {
    const size_t power = kLetters.find(unit[0]);
    if (power == std::string_view::npos) return 0;
    const std::string rest = unit.substr(1);
    if (rest != "" && rest != "iB" && rest != "B") return 0;
    scale = std::pow(rest == "B" ? 1000.0 : 1024.0, double(power + 1));
  }
  const double bytes = value * scale;
  return bytes >= 1 && bytes < 9e18 ? int64_t(bytes) : 0;  // not for NaN either
}

}  // namespace moemamba
