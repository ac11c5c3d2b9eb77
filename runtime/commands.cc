#include "runtime/commands.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "runtime/model_kind.h"
#include "runtime/plot.h"
#include "runtime/progress.h"
#include "runtime/run_folder.h"
#include "runtime/token_check.h"
#include "runtime/trainer.h"
#include "runtime/weights.h"

namespace moemamba {

namespace {

std::vector<std::string> list(const google::protobuf::RepeatedPtrField<std::string>& values) {
  return {values.begin(), values.end()};
}

// Of the tokenizer; 0 and -1 where there is none.
int64_t vocabulary_of(const std::optional<Tokenizer>& tokenizer) {
  return tokenizer ? tokenizer->vocabulary() : 0;
}
int32_t end_of_document(const std::optional<Tokenizer>& tokenizer) {
  return tokenizer ? tokenizer->end_of_document() : -1;
}

TrainerOptions trainer_options(const TrainRequest& request,
                               const std::optional<Tokenizer>& tokenizer) {
  const TrainConfig& train = request.train;
  TrainerOptions options;
  options.sizes = model_sizes(request.model, vocabulary_of(tokenizer));
  options.optimizer = optimizer_settings(train);
  options.data.files = list(request.data.train());
  options.data.vocabulary = options.sizes.V;
  options.data.end_of_document = end_of_document(tokenizer);
  options.data.sequence_length = train.sequence_length();
  options.data.global_batch = train.global_batch_size();
  options.data.seed = train.seed();
  options.data.sampling =
      request.data.sampling() == DataConfig::CIRCULAR ? Sampling::circular : Sampling::epochs;
  options.micro_batch = train.micro_batch_size();
  options.routing_group = train.routing_group();
  options.exchange_rows = request.parallel.exchange_rows();
  options.threads = request.threads;
  options.seed = train.seed();
  return options;
}

EvaluatorOptions evaluator_options(const TrainConfig& train,
                                   const std::optional<Tokenizer>& tokenizer) {
  return {.routing_group = train.routing_group(),
          .most_tokens = train.eval_tokens(),
          .end_of_document = end_of_document(tokenizer)};
}

// The tokenizer of a run, once its token files are known to be of use with it.
std::optional<Tokenizer> checked_tokenizer(const DataConfig& data, const ModelConfig& model,
                                           bool trains) {
  std::optional<Tokenizer> tokenizer = open_tokenizer(data.tokenizer());
  const int64_t vocabulary = tokenizer ? tokenizer->vocabulary() : model.vocabulary();
  if (trains) check_token_files("data.train", list(data.train()), tokenizer, vocabulary);
  check_token_files("data.validation", list(data.validation()), tokenizer, vocabulary);
  return tokenizer;
}

// One training run: the loop around Trainer::step.
class Run {
 public:
  Run(FileSystem& files, ProcessGroups& groups, const TrainRequest& request);
  std::optional<Evaluation> go();

 private:
  bool speaks() const { return groups_.rank == 0; }
  void introduce();
  void after_step(StepRecord& record);
  void report(const StepRecord& record, bool ends);
  void evaluate(StepRecord& record);
  void save(int64_t step);
  void finish();

  FileSystem& files_;
  ProcessGroups& groups_;
  const TrainRequest& request_;
  std::optional<Tokenizer> tokenizer_;  // data.tokenizer may be "none"
  Trainer trainer_;
  std::optional<Evaluator> evaluator_;
  std::optional<MetricsWriter> metrics_;
  std::optional<Progress> progress_;
  std::optional<Evaluation> evaluation_;
  int64_t skipped_in_a_row_ = 0;
};

Run::Run(FileSystem& files, ProcessGroups& groups, const TrainRequest& request)
    : files_(files),
      groups_(groups),
      request_(request),
      tokenizer_(checked_tokenizer(request.data, request.model, true)),
      trainer_(groups, trainer_options(request, tokenizer_)) {
  Session& session = trainer_.session();
  const bool holds_out = request.data.validation_size() > 0;
  HeldOut held_out =
      open_held_out(list(holds_out ? request.data.validation() : request.data.train()));
  const double bytes_per_token = double(held_out.bytes) / double(held_out.tokens());
  if (holds_out)
    evaluator_.emplace(session, std::move(held_out), evaluator_options(request.train, tokenizer_));
  if (!request.init_from.empty()) {
    load_weights(request.init_from, session.store, groups);
    check_same_kind(request.init_from, request.model, tokenizer_);
  }
  barrier(*groups.control, session.compute);
  if (!speaks()) return;
  claim_run_folder(files, request.run, request.resolved_text, request.overwrite);
  metrics_.emplace(files, join_path(request.run, "metrics.jsonl"));
  if (request.train.progress() == TrainConfig::OFF) return;
  const ModelSizes& sizes = session.model.sizes();
  progress_.emplace(
      stderr,
      ProgressOptions{.steps = request.train.steps(),
                      .experts = sizes.moe_layers() * sizes.E,
                      .routed_rows = int64_t(request.train.global_batch_size()) *
                                     request.train.sequence_length() * sizes.K * sizes.moe_layers(),
                      .bytes_per_token = bytes_per_token,
                      .terminal = request.terminal || request.train.progress() == TrainConfig::ON,
                      .color = request.color,
                      .steps_between_lines = request.train.log_interval(),
                      .columns = request.columns});
}

void Run::introduce() {
  const std::string idle = idle_ranks_warning(
      request_.train.global_batch_size(), request_.train.routing_group(), groups_.layout.ranks());
  if (speaks() && !idle.empty()) std::fprintf(stderr, "moemamba: %s\n", idle.c_str());
  if (!progress_) return;
  Session& session = trainer_.session();
  const ModelSizes& s = session.model.sizes();
  const RankLayout& layout = groups_.layout;
  progress_->say(concat("model      ", s.blocks, " blocks of (Mamba, ", s.E, " experts x top-", s.K,
                        "), width ", s.D, ", vocabulary ", s.V));
  progress_->say(concat("parameters ", s.parameters_total(), " in all, ", s.parameters_active(),
                        " active per token, and ", 2 * s.V * s.D, " in embedding and head"));
  std::string experts;
  for (int c = 0; c < layout.expert_size(); ++c)
    experts += concat(c ? ", " : "", layout.experts_of(c));
  progress_->say(concat("ranks      ", layout.ranks(), " (data), experts over ",
                        layout.expert_size(), " of them: ", experts));
  progress_->say(concat("memory     ", session.arena.capacity() >> 20,
                        " MiB of activations per rank; exchange holds ",
                        session.exchange.capacity(), " rows"));
  progress_->say(concat("run        ", request_.run, ", ", request_.train.steps(), " steps of ",
                        request_.train.global_batch_size(), " x ", request_.train.sequence_length(),
                        " tokens"));
}

void Run::evaluate(StepRecord& record) {
  trainer_.wait_weights();
  evaluation_ = evaluator_->run();
  record.val_loss = evaluation_->loss;
  record.val_bpb = evaluation_->bits_per_byte;
  if (!progress_) return;
  char text[160];
  int length = std::snprintf(text, sizeof text, "held-out   after step %lld: loss %.4f",
                             static_cast<long long>(record.step + 1), evaluation_->loss);
  if (evaluation_->bits_per_byte)
    length += std::snprintf(text + length, sizeof text - size_t(length), ", %.4f bits per byte",
                            *evaluation_->bits_per_byte);
  progress_->say(std::string_view(text, size_t(length)));
}

void Run::save(int64_t step) {
  trainer_.wait_weights();
  Session& session = trainer_.session();
  WeightsMetadata metadata = describe_kind(request_.model, tokenizer_);
  metadata["config"] = request_.resolved_text;
  save_weights(files_, join_path(request_.run, "weights"), session.store, groups_, session.compute,
               metadata, step);
  if (speaks() && tokenizer_ && tokenizer_->kind() == TokenizerKind::bpe)
    tokenizer_->save(files_, join_path(request_.run, "tokenizer.model"));
}

// The terminal's line of a step, and what is out of the ordinary in it.
void Run::report(const StepRecord& record, bool ends) {
  constexpr int64_t kMostSkipped = 10;
  skipped_in_a_row_ = trainer_.skipped() ? skipped_in_a_row_ + 1 : 0;
  check(skipped_in_a_row_ < kMostSkipped, "steps ", record.step - kMostSkipped + 2, " to ",
        record.step + 1,
        ": loss or gradient is not finite; no parameter was changed by them. Try a "
        "lower train.lr or a lower train.grad_clip");
  if (!progress_) return;
  if (trainer_.skipped())
    progress_->say(
        concat("step ", record.step + 1, ": loss or gradient is not finite: not applied"));
  progress_->update(record, ends);
}

void Run::after_step(StepRecord& record) {
  const TrainConfig& train = request_.train;
  const int64_t done = record.step + 1;
  const auto due = [&](int64_t interval) { return interval > 0 && done % interval == 0; };
  const bool last = done == train.steps(), stops = trainer_.stopping() && !last;
  report(record, last || stops);
  if (evaluator_ && !stops && (due(train.eval_interval()) || last)) evaluate(record);
  if (metrics_) metrics_->record(record);
  if (last || stops || due(train.save_interval())) save(done);
  if (stops && progress_)
    progress_->say(concat("stopped    after step ", done, " of ", train.steps(),
                          ", as asked; the weights are in ", join_path(request_.run, "weights")));
}

void Run::finish() {
  if (!speaks()) return;
  if (progress_) progress_->finish();
  if (metrics_->lost_lines() > 0)
    std::fprintf(stderr, "metrics: %lld of the run's lines were lost\n",
                 static_cast<long long>(metrics_->lost_lines()));
  write_loss_svg(files_, request_.run);
  const int64_t experts = trainer_.session().model.sizes().E;
  const std::vector<double>& counts = evaluation_ ? evaluation_->counts : trainer_.expert_counts();
  if (experts > 0)
    write_file(files_, join_path(request_.run, "experts.txt"), expert_table(counts, experts));
}

std::optional<Evaluation> Run::go() {
  introduce();
  for (int64_t k = 0; k < request_.train.steps() && !trainer_.stopping(); ++k) {
    if (request_.stop_wanted && request_.stop_wanted()) trainer_.ask_to_stop();
    StepRecord record = trainer_.step(k);
    after_step(record);
  }
  if (request_.train.steps() == 0) save(0);
  finish();
  return evaluation_;
}

// The model of a finished run, for reading only.
Session open_session(ProcessGroups& groups, const UseRequest& request, int64_t vocabulary,
                     int64_t sequences, int64_t length) {
  return Session(groups, model_sizes(request.model, vocabulary), request.threads, sequences, length,
                 request.parallel.exchange_rows(), false);
}

}  // namespace

std::optional<Tokenizer> open_tokenizer(const std::string& setting) {
  if (setting == "none") return {};
  if (setting == "bytes") return Tokenizer::bytes();
  try {
    return Tokenizer::load(setting);
  } catch (const Error& error) {
    throw Error(concat(
        "--data.tokenizer=", setting, ": ", error.what(),
        "; expected \"bytes\", \"none\" or a tokenizer.model as `moemamba prepare` writes it"));
  }
}

std::optional<Evaluation> run_training(FileSystem& files, ProcessGroups& groups,
                                       const TrainRequest& request) {
  check(request.data.train_size() > 0,
        "data.train: no token file; make one with `moemamba prepare`, then --data.train=FILE");
  return Run(files, groups, request).go();
}

Evaluation run_evaluation(ProcessGroups& groups, const UseRequest& request) {
  check(request.data.validation_size() > 0,
        "data.validation: no token file to evaluate on; --data.validation=FILE");
  const std::optional<Tokenizer> tokenizer = checked_tokenizer(request.data, request.model, false);
  const BatchShare share =
      share_of_batch(request.train.global_batch_size(), request.train.routing_group(),
                     request.train.micro_batch_size(), groups.rank, groups.layout.ranks());
  Session session = open_session(groups, request, vocabulary_of(tokenizer), share.micro_batch,
                                 request.train.sequence_length());
  load_weights(request.weights, session.store, groups);
  Evaluator evaluator(session, open_held_out(list(request.data.validation())),
                      evaluator_options(request.train, tokenizer));
  return evaluator.run();
}

std::string run_generation(ProcessGroups& groups, const UseRequest& request,
                           const std::string& prompt, const SamplingOptions& options, FILE* out) {
  const std::optional<Tokenizer> tokenizer = open_tokenizer(request.data.tokenizer());
  check(tokenizer.has_value(),
        "--data.tokenizer=none: this model was trained on ids alone, which no tokenizer turns into "
        "text; give the tokenizer that made its token files: --data.tokenizer=FILE");
  constexpr int64_t kPiece = 64;  // tokens of the prompt that are read at once
  Session session = open_session(groups, request, tokenizer->vocabulary(), 1, kPiece);
  load_weights(request.weights, session.store, groups);
  if (groups.rank == 0) std::fputs(prompt.c_str(), out);
  const auto piece = [out](std::string_view text) {
    std::fwrite(text.data(), 1, text.size(), out);
    std::fflush(out);
  };
  const std::string text = generate(session, *tokenizer, prompt, options, piece);
  if (groups.rank == 0) std::fputs("\n", out);
  return text;
}

std::string expert_table(const std::vector<double>& counts, int64_t experts) {
  std::string table = "layer   load of each expert, as a multiple of the even share\n";
  for (size_t first = 0; first < counts.size(); first += size_t(experts)) {
    double sum = 0;
    for (size_t e = first; e < first + size_t(experts); ++e) sum += counts[e];
    char cell[32];
    std::snprintf(cell, sizeof cell, "%5lld ", static_cast<long long>(first / size_t(experts)));
    table += cell;
    for (size_t e = first; e < first + size_t(experts); ++e) {
      std::snprintf(cell, sizeof cell, " %5.2f", sum > 0 ? counts[e] * double(experts) / sum : 0);
      table += cell;
    }
    table += "\n";
  }
  return table;
}

}  // namespace moemamba
