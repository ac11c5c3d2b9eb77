#include <algorithm>
#include <cmath>
#include <cstdio>

#include "launcher/supervisor/status_facts.h"

namespace moemamba {

namespace {

// Of more ranks or layers only the first have series of their own, so that no run makes a database
// of them grow without bounds. Steps and experts are no labels at all.
constexpr size_t kMostRanks = 1024;
constexpr int kMostLayers = 512;

std::string number(double value) {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value > 0 ? "+Inf" : "-Inf";
  char digits[32];
  std::snprintf(digits, sizeof digits, "%.10g", value);
  return digits;
}

// The value of a label: quotes, backslashes and newlines escaped.
std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    if (c == '\n')
      out += "\\n";
    else if (static_cast<unsigned char>(c) >= 0x20 && static_cast<unsigned char>(c) < 0x7f)
      out += c;
    else
      out += '?';
  }
  return out + "\"";
}

// Families one after the other, each with all of its samples.
class MetricsOut {
 public:
  MetricsOut& family(const char* name, const char* type, const char* help) {
    name_ = name;
    text_ += std::string("# HELP moemamba_") + name + " " + help + "\n# TYPE moemamba_" + name +
             " " + type + "\n";
    return *this;
  }
  MetricsOut& sample(double value, const std::string& labels = "", const char* suffix = "") {
    text_ += "moemamba_" + name_ + suffix;
    if (!labels.empty()) text_ += "{" + labels + "}";
    text_ += " " + number(value) + "\n";
    return *this;
  }
  void gauge(const char* name, const char* help, double value) {
    family(name, "gauge", help).sample(value);
  }
  void counter(const char* name, const char* help, double value) {
    family(name, "counter", help).sample(value);
  }
  std::string take() { return std::move(text_); }

 private:
  std::string text_, name_;
};

void put_run(MetricsOut& out, const RunView& view, const RunRecords::State& records, double now) {
  out.family("run_info", "gauge", "Names of the run; always 1.")
      .sample(1, "run_id=" + quoted(view.run_id));
  out.family("run_state", "gauge", "1 for the state that the run is in.");
  for (int s = 0; s <= int(RunState::failed); ++s)
    out.sample(s == int(view.state), std::string("state=\"") + name_of(RunState(s)) + "\"");
  out.gauge("healthy", "0 where the run has failed or a rank hangs.", health_of(view).good);
  out.gauge("supervisor_uptime_seconds", "Since the supervisor began.", now);
  const RunProgress progress = progress_of(view, records);
  out.gauge("steps_done", "Steps behind the run, of steps_planned.", double(progress.steps_done));
  out.gauge("steps_planned", "Steps of the whole run.", double(view.steps));
  out.gauge("batch_tokens", "Tokens of one step.",
            double(view.global_batch) * double(view.sequence_length));
  if (progress.eta_seconds >= 0)
    out.gauge("eta_seconds", "Until the last step at the present speed.", progress.eta_seconds);
  out.gauge("ranks", "Ranks of the present attempt.", view.ranks);
  out.gauge("hosts_left_out", "Hosts that failed too often, or did not answer.",
            double(view.hosts_left_out.size()));
  out.counter("restarts_total", "Attempts after the first.", view.restarts);
  out.counter("steps_lost_total", "Steps taken again because of restarts.",
              double(view.steps_lost));
  out.gauge("skipped_steps", "Steps of this attempt that were not finite and left out.",
            double(view.skipped_steps));
  out.gauge("failed_saves", "Checkpoints of this attempt that failed.", double(view.failed_saves));
  out.gauge("saved_step", "Of the newest checkpoint; -1: none.", double(view.saved_step));
  out.gauge("save_duration_seconds", "Of the latest save.", view.save_seconds);
  out.counter("refused_control_connections_total", "Strangers at the ranks' port.",
              double(view.refused_connections));
}

void put_latest(MetricsOut& out, const RunRecords::State& records) {
  if (records.latest) {
    const StepRecord& r = *records.latest;
    out.gauge("training_loss_nats", "What is optimised, per token, latest step.", r.loss);
    out.gauge("training_cross_entropy_nats", "Per token, latest step.", r.ce);
    out.gauge("balance_loss", "Part of the loss, latest step.", r.balance_loss);
    out.gauge("router_z_loss", "Part of the loss, latest step.", r.z_loss);
    out.gauge("grad_norm", "Before clipping, latest step.", r.grad_norm);
    out.gauge("learning_rate", "Of the latest step.", r.lr);
    out.gauge("tokens_per_second", "Mean over the latest steps.", records.tokens_per_second);
    out.gauge("expert_load_max_ratio", "Most loaded expert of all layers / even share.",
              r.load_max_over_mean);
    out.gauge("dead_experts", "Experts of all layers that no token chose, latest step.",
              double(r.dead_experts));
    out.gauge("dropped_rows", "Rows beyond a capacity, latest step.", double(r.dropped_rows));
  }
  if (!records.latest_evaluation) return;
  const StepRecord& r = *records.latest_evaluation;
  out.gauge("heldout_loss_nats", "Per token, latest evaluation.", *r.val_loss);
  if (r.val_bpb) out.gauge("heldout_bits_per_byte", "Latest evaluation.", *r.val_bpb);
}

// Of the steps that this supervisor has seen, so that they never go back.
void put_totals(MetricsOut& out, const RunView& view, const RecordTotals& totals) {
  out.counter("steps_total", "Steps seen, those taken again included.", double(totals.steps));
  out.counter("tokens_total", "Tokens of these steps.",
              double(totals.steps) * double(view.global_batch) * double(view.sequence_length));
  out.counter("dropped_rows_total", "Rows beyond a capacity.", totals.dropped_rows);
  const StepSeconds& s = totals.seconds;
  out.family("phase_seconds_total", "counter", "Time of rank 0 in each phase of these steps.");
  for (const auto& [phase, seconds] : {std::pair{"data", s.data},
                                       {"forward", s.forward},
                                       {"backward", s.backward},
                                       {"exchange", s.exchange},
                                       {"reduction", s.reduction},
                                       {"optimizer", s.optimizer}})
    out.sample(seconds, std::string("phase=\"") + phase + "\"");
  out.family("step_duration_seconds", "histogram", "From begin to end of these steps.");
  int64_t count = 0;
  for (size_t i = 0; i < kDurationBounds.size(); ++i) {
    count += totals.durations[i];
    out.sample(double(count), "le=\"" + number(kDurationBounds[i]) + "\"", "_bucket");
  }
  out.sample(double(count + totals.durations.back()), "le=\"+Inf\"", "_bucket");
  out.sample(s.all, "", "_sum");
  out.sample(double(count + totals.durations.back()), "", "_count");
}

void put_ranks(MetricsOut& out, const RunView& view, double now) {
  struct Family {
    const char *name, *help;
    double (*value)(const RankView& rank, double now);
  };
  static constexpr Family kFamilies[] = {
      {"rank_up", "1 where the rank is connected and makes progress.",
       [](const RankView& r, double) { return double(r.state == RankState::alive); }},
      {"rank_heartbeat_age_seconds", "Since it was heard.",
       [](const RankView& r, double now) { return std::max(0.0, now - r.heard); }},
      {"rank_steps_done", "Latest step that ended, counted from 1.",
       [](const RankView& r, double) { return double(r.step + 1); }},
      {"rank_step_seconds", "Latest step.",
       [](const RankView& r, double) { return r.step_seconds; }},
      {"rank_busy_seconds", "Of the latest step, not waiting for other ranks.",
       [](const RankView& r, double) { return r.busy_seconds; }},
      {"rank_exchange_seconds", "Of the latest step, in all-to-all.",
       [](const RankView& r, double) { return r.exchange_seconds; }},
      {"rank_resident_memory_bytes", "Of its process.",
       [](const RankView& r, double) { return double(r.resident_bytes); }},
      {"rank_gpu_memory_bytes", "Used on its GPU; 0: none.",
       [](const RankView& r, double) { return double(r.gpu_bytes); }},
      {"rank_straggler", "1 where it is slower than the others for long.",
       [](const RankView& r, double) { return double(r.straggler); }},
  };
  const size_t ranks = std::min(kMostRanks, view.of_ranks.size());
  for (const Family& family : kFamilies) {
    if (ranks == 0) return;
    out.family(family.name, "gauge", family.help);
    for (size_t r = 0; r < ranks; ++r)
      out.sample(family.value(view.of_ranks[r], now),
                 "rank=\"" + std::to_string(view.of_ranks[r].rank) + "\"");
  }
}

void put_experts(MetricsOut& out, const ExpertView& experts) {
  const int layers = std::min(kMostLayers, experts.layers);
  if (layers == 0 || experts.experts == 0 ||
      experts.choices.size() != size_t(experts.layers) * size_t(experts.experts))
    return;
  out.family("expert_load_ratio", "gauge",
             "Choices of a layer's experts / even share: most, least, variation.");
  for (int layer = 0; layer < layers; ++layer) {
    const LayerLoad load = load_of(experts, layer);
    const std::string label = "layer=\"" + std::to_string(layer) + "\",stat=";
    out.sample(load.most, label + "\"max\"");
    out.sample(load.least, label + "\"min\"");
    out.sample(load.variation, label + "\"cv\"");
  }
  out.family("layer_dead_experts", "gauge", "Experts of a layer that no token chose.");
  for (int layer = 0; layer < layers; ++layer)
    out.sample(load_of(experts, layer).dead, "layer=\"" + std::to_string(layer) + "\"");
}

}  // namespace

std::string metrics_text(const RunView& view, const RunRecords::State& records,
                         const StatusCounts& counts, double now) {
  MetricsOut out;
  put_run(out, view, records, now);
  put_latest(out, records);
  put_totals(out, view, records.totals);
  put_ranks(out, view, now);
  put_experts(out, view.experts);
  out.counter("status_answers_total", "Requests that were answered.", double(counts.answered));
  out.counter("status_refusals_total", "Requests that were refused.", double(counts.refused));
  out.counter("status_cut_off_total", "Connections that were too slow or too many.",
              double(counts.cut_off));
  return out.take();
}

}  // namespace moemamba
