#include "runtime/run_records.h"

#include <nlohmann/json.hpp>
#include <utility>

namespace moemamba {

namespace {

using Json = nlohmann::json;

constexpr size_t kMostLine = 1 << 18, kPiece = 1 << 19;
constexpr size_t kMostSamples = 10, kMostSampleBytes = 16 << 10, kSpeeds = 20;

double number(const Json& row, const char* name) {
  const auto at = row.find(name);
  return at != row.end() && at->is_number() ? at->get<double>() : NAN;
}

int64_t whole(const Json& row, const char* name) {
  const auto at = row.find(name);
  return at != row.end() && at->is_number_integer() ? at->get<int64_t>() : 0;
}

Json parsed(std::string_view line) {
  Json row = Json::parse(line, nullptr, false);
  const bool fits = row.is_object() && row.contains("step") && row["step"].is_number_integer() &&
                    row["step"].get<int64_t>() >= 0;
  return fits ? row : Json();
}

std::optional<StepRecord> record_of(std::string_view line) {
  const Json row = parsed(line);
  if (row.is_null()) return std::nullopt;
  StepRecord record{.step = whole(row, "step"),
                    .loss = number(row, "loss"),
                    .ce = number(row, "ce"),
                    .balance_loss = number(row, "balance_loss"),
                    .z_loss = number(row, "z_loss"),
                    .grad_norm = number(row, "grad_norm"),
                    .lr = number(row, "lr"),
                    .tokens_per_second = number(row, "tokens_per_second"),
                    .load_max_over_mean = number(row, "load_max_over_mean"),
                    .dead_experts = whole(row, "dead_experts"),
                    .dropped_rows = whole(row, "dropped_rows")};
  if (row.contains("val_loss")) record.val_loss = number(row, "val_loss");
  if (row.contains("val_bpb")) record.val_bpb = number(row, "val_bpb");
  record.failed_saves = whole(row, "failed_saves");
  record.replays = whole(row, "replays");
  record.skipped = row.value("skipped", Json()) == true;
  const Json seconds = row.value("seconds", Json());
  if (!seconds.is_object()) return record;
  const auto of = [&](const char* name) {
    const double value = number(seconds, name);
    return std::isfinite(value) && value > 0 ? value : 0;
  };
  record.seconds = {.data = of("data"),
                    .forward = of("forward"),
                    .backward = of("backward"),
                    .exchange = of("exchange"),
                    .reduction = of("reduction"),
                    .optimizer = of("optimizer"),
                    .all = of("all")};
  return record;
}

std::optional<SampleText> sample_of(std::string_view line) {
  const Json row = parsed(line);
  if (row.is_null()) return std::nullopt;
  const auto text = [&](const char* name) {
    const auto at = row.find(name);
    return at != row.end() && at->is_string() ? at->get<std::string>().substr(0, kMostSampleBytes)
                                              : std::string();
  };
  return SampleText{.step = whole(row, "step"), .prompt = text("prompt"), .text = text("text")};
}

}  // namespace

RunRecords::RunRecords(const std::string& run)
    : metrics_(join_path(run, "metrics.jsonl"), kMostLine),
      sample_lines_(join_path(run, "samples.jsonl"), kMostLine) {}

bool RunRecords::poll() {
  const bool more_samples = poll_samples();
  return poll_metrics() || more_samples;
}

// Lines are read and parsed outside of the lock: a disk may take its time.
bool RunRecords::poll_metrics() {
  bool anew = false;
  std::vector<StepRecord> records;
  const bool more = metrics_.poll(
      kPiece, [&] { anew = true; },
      [&](std::string_view line) {
        if (auto record = record_of(line)) records.push_back(std::move(*record));
      });
  const std::lock_guard lock(mutex_);
  if (anew) {
    next_ = Book();
    replaced_ = behind_ = true;
  }
  for (const StepRecord& record : records) {
    write(replaced_ ? next_ : book_, record);
    if (!behind_) count(record);
  }
  behind_ = more;
  if (more || !replaced_) return more;
  book_ = std::exchange(next_, Book());
  replaced_ = false;
  ++epoch_;
  return more;
}

bool RunRecords::poll_samples() {
  bool anew = false;
  std::deque<SampleText> found;
  const bool more = sample_lines_.poll(
      kPiece, [&] { anew = true; },
      [&](std::string_view line) {
        if (auto sample = sample_of(line)) found.push_back(std::move(*sample));
        if (found.size() > kMostSamples) found.pop_front();
      });
  const std::lock_guard lock(mutex_);
  if (anew) samples_.clear();
  for (SampleText& sample : found) {
    samples_.push_back(std::move(sample));
    if (samples_.size() > kMostSamples) samples_.pop_front();
  }
  return more;
}

void RunRecords::write(Book& book, const StepRecord& record) {
  book.curves.add(record.step,
                  {float(record.loss), float(record.ce), float(record.grad_norm), float(record.lr),
                   float(record.tokens_per_second), float(record.dropped_rows),
                   float(record.val_loss.value_or(NAN)), float(record.val_bpb.value_or(NAN))});
  book.latest = record;
  if (record.val_loss) book.latest_evaluation = record;
  if (record.tokens_per_second > 0 && std::isfinite(record.tokens_per_second))
    book.speeds.push_back(record.tokens_per_second);
  if (book.speeds.size() > kSpeeds) book.speeds.pop_front();
}

void RunRecords::count(const StepRecord& record) {
  ++totals_.steps;
  totals_.dropped_rows += double(std::max<int64_t>(0, record.dropped_rows));
  StepSeconds& sum = totals_.seconds;
  sum.data += record.seconds.data;
  sum.forward += record.seconds.forward;
  sum.backward += record.seconds.backward;
  sum.exchange += record.seconds.exchange;
  sum.reduction += record.seconds.reduction;
  sum.optimizer += record.seconds.optimizer;
  sum.all += record.seconds.all;
  size_t bucket = 0;
  while (bucket < kDurationBounds.size() && record.seconds.all > kDurationBounds[bucket]) ++bucket;
  ++totals_.durations[bucket];
}

RunRecords::State RunRecords::state() const {
  const std::lock_guard lock(mutex_);
  State state{.epoch = epoch_,
              .behind = behind_,
              .latest = book_.latest,
              .latest_evaluation = book_.latest_evaluation,
              .tokens_per_second = 0,
              .totals = totals_};
  // Of steps of one size the mean speed is that of the mean time.
  double inverse = 0;
  for (const double speed : book_.speeds) inverse += 1 / speed;
  if (inverse > 0) state.tokens_per_second = double(book_.speeds.size()) / inverse;
  return state;
}

std::vector<CurveRow> RunRecords::rows(int64_t from, size_t most) const {
  const std::lock_guard lock(mutex_);
  return book_.curves.rows(from, most);
}

std::vector<SampleText> RunRecords::samples() const {
  const std::lock_guard lock(mutex_);
  return {samples_.begin(), samples_.end()};
}

}  // namespace moemamba
