#include <cmath>
#include <cstdio>

#include "launcher/supervisor/status_facts.h"
#include "runtime/json_text.h"

namespace moemamba {

namespace {

constexpr size_t kMostPoints = 2000;

// JSON from front to back. A comma is due behind anything but an opening bracket or a colon.
class JsonOut {
 public:
  void open(const char* name, char bracket) {
    begin(name);
    text_ += bracket;
  }
  void close(char bracket) { text_ += bracket; }
  void put(const char* name, const std::string& text) { begin(name), text_ += json_text(text); }
  void put(const char* name, const char* text) { begin(name), text_ += json_text(text); }
  void put(const char* name, bool value) { begin(name), text_ += value ? "true" : "false"; }
  void put(const char* name, int value) { put(name, int64_t(value)); }
  void put(const char* name, int64_t value) { begin(name), text_ += std::to_string(value); }
  void put(const char* name, uint64_t value) { begin(name), text_ += std::to_string(value); }
  // Seven digits, for those who look at it. What is not finite is null.
  void put(const char* name, double value) {
    begin(name);
    char digits[32];
    std::snprintf(digits, sizeof digits, "%.7g", value);
    text_ += std::isfinite(value) ? digits : "null";
  }
  std::string take() { return std::move(text_); }

 private:
  void begin(const char* name) {  // null: an element of a list
    const char last = text_.empty() ? '{' : text_.back();
    if (last != '{' && last != '[' && last != ':') text_ += ',';
    if (!name) return;
    text_ += '"';
    text_ += name;
    text_ += "\":";
  }
  std::string text_;
};

void put_record(JsonOut& json, const char* name, const StepRecord& r) {
  json.open(name, '{');
  json.put("step", r.step);
  json.put("loss", r.loss);
  json.put("ce", r.ce);
  json.put("balance_loss", r.balance_loss);
  json.put("z_loss", r.z_loss);
  json.put("grad_norm", r.grad_norm);
  json.put("lr", r.lr);
  json.put("tokens_per_second", r.tokens_per_second);
  json.put("load_max_over_mean", r.load_max_over_mean);
  json.put("dead_experts", r.dead_experts);
  json.put("dropped_rows", r.dropped_rows);
  json.put("skipped", r.skipped);
  if (r.val_loss) json.put("val_loss", *r.val_loss);
  if (r.val_bpb) json.put("val_bpb", *r.val_bpb);
  json.open("seconds", '{');
  json.put("data", r.seconds.data);
  json.put("forward", r.seconds.forward);
  json.put("backward", r.seconds.backward);
  json.put("exchange", r.seconds.exchange);
  json.put("reduction", r.seconds.reduction);
  json.put("optimizer", r.seconds.optimizer);
  json.put("all", r.seconds.all);
  json.close('}');
  json.close('}');
}

void put_rank(JsonOut& json, const RankView& r, double now) {
  json.open(nullptr, '{');
  json.put("rank", r.rank);
  json.put("host", r.host);
  json.put("gpu", r.gpu);
  json.put("pid", r.pid);
  json.put("state", name_of(r.state));
  json.put("straggler", r.straggler);
  if (r.state != RankState::absent) {
    json.put("heard_seconds_ago", std::max(0.0, now - r.heard));
    json.put("progress_seconds_ago", std::max(0.0, now - r.progressed));
    json.put("phase", phase_name(r.activity.phase));
    json.put("at_step", r.activity.step);
    json.put("layer", r.activity.layer);
    json.put("collective", r.activity.collective);
    json.put("group", r.group);
    json.put("in_collective", r.activity.in_collective);
    json.put("rows_expected", r.activity.rows_expected);
    json.put("rows_received", r.activity.rows_received);
    json.put("resident_bytes", r.resident_bytes);
    json.put("gpu_bytes", r.gpu_bytes);
  }
  json.put("step", r.step);
  json.put("step_seconds", r.step_seconds);
  json.put("busy_seconds", r.busy_seconds);
  json.put("exchange_seconds", r.exchange_seconds);
  json.close('}');
}

void put_experts(JsonOut& json, const ExpertView& experts) {
  json.open("experts", '{');
  json.put("step", experts.step);
  json.put("dropped_rows", experts.dropped_rows);
  json.put("layers", experts.layers);
  json.put("experts", experts.experts);
  json.open("choices", '[');
  for (const uint64_t choices : experts.choices) json.put(nullptr, choices);
  json.close(']');
  json.close('}');
}

void put_run(JsonOut& json, const RunView& view) {
  json.put("run", view.run);
  json.put("run_id", view.run_id);
  json.put("job", view.job);
  json.put("state", name_of(view.state));
  json.put("state_text", view.state_text);
  const Health health = health_of(view);
  json.put("healthy", health.good);
  json.put("health", health.text);
  json.put("steps", view.steps);
  json.put("global_batch", view.global_batch);
  json.put("sequence_length", view.sequence_length);
  json.put("ranks", view.ranks);
  json.put("expert_ranks", view.expert_ranks);
  json.put("restarts", view.restarts);
  json.put("steps_lost", view.steps_lost);
  json.put("saved_step", view.saved_step);
  json.put("save_seconds", view.save_seconds);
  json.put("failed_saves", view.failed_saves);
  json.put("skipped_steps", view.skipped_steps);
  json.put("refused_connections", view.refused_connections);
  json.put("hang_report", view.hang_report);
  json.open("hosts_left_out", '[');
  for (const std::string& host : view.hosts_left_out) json.put(nullptr, host);
  json.close(']');
}

struct Listed {
  const char* name;
  Column column;
  float CurveValue::*value;
};

}  // namespace

std::string status_json(const RunView& view, const RunRecords::State& records, double now) {
  JsonOut json;
  json.open(nullptr, '{');
  json.put("format", 1);
  put_run(json, view);
  const RunProgress progress = progress_of(view, records);
  json.put("supervisor_seconds", now);
  json.put("attempt_seconds", std::max(0.0, now - view.started));
  json.put("steps_done", progress.steps_done);
  json.put("step_seconds", progress.step_seconds);
  json.put("tokens_per_second", records.tokens_per_second);
  if (progress.eta_seconds >= 0) json.put("eta_seconds", progress.eta_seconds);
  json.put("curves_epoch", records.epoch);
  if (records.latest) put_record(json, "latest", *records.latest);
  if (records.latest_evaluation) put_record(json, "latest_evaluation", *records.latest_evaluation);
  json.open("of_ranks", '[');
  for (const RankView& rank : view.of_ranks) put_rank(json, rank, now);
  json.close(']');
  put_experts(json, view.experts);
  json.open("events", '[');
  for (const EventView& event : view.events) {
    json.open(nullptr, '{');
    json.put("milliseconds_since_1970", int64_t(event.wall_seconds * 1e3));
    json.put("kind", event.kind);
    json.put("step", event.step);
    json.put("text", event.text);
    json.close('}');
  }
  json.close(']');
  json.close('}');
  return json.take() + "\n";
}

std::string curves_json(const RunRecords& records, int64_t from) {
  static constexpr Listed kListed[] = {
      {"loss", Column::loss, &CurveValue::mean},
      {"ce", Column::ce, &CurveValue::mean},
      {"ce_least", Column::ce, &CurveValue::least},
      {"ce_most", Column::ce, &CurveValue::most},
      {"grad_norm", Column::grad_norm, &CurveValue::mean},
      {"grad_norm_least", Column::grad_norm, &CurveValue::least},
      {"grad_norm_most", Column::grad_norm, &CurveValue::most},
      {"lr", Column::lr, &CurveValue::mean},
      {"tokens_per_second", Column::tokens_per_second, &CurveValue::mean},
      {"dropped_rows", Column::dropped_rows, &CurveValue::mean},
      {"val_loss", Column::val_loss, &CurveValue::mean},
      {"val_bpb", Column::val_bpb, &CurveValue::mean},
  };
  const RunRecords::State state = records.state();
  const std::vector<CurveRow> rows = records.rows(from, kMostPoints);
  JsonOut json;
  json.open(nullptr, '{');
  json.put("format", 1);
  json.put("epoch", state.epoch);
  json.put("behind", state.behind);
  json.open("step", '[');
  for (const CurveRow& row : rows) json.put(nullptr, row.last);
  json.close(']');
  for (const Listed& listed : kListed) {
    json.open(listed.name, '[');
    for (const CurveRow& row : rows) json.put(nullptr, double(row[listed.column].*listed.value));
    json.close(']');
  }
  json.close('}');
  return json.take() + "\n";
}

std::string samples_json(const RunRecords& records) {
  JsonOut json;
  json.open(nullptr, '{');
  json.put("format", 1);
  json.open("samples", '[');
  for (const SampleText& sample : records.samples()) {
    json.open(nullptr, '{');
    json.put("step", sample.step);
    json.put("prompt", sample.prompt);
    json.put("text", sample.text);
    json.close('}');
  }
  json.close(']');
  json.close('}');
  return json.take() + "\n";
}

}  // namespace moemamba
