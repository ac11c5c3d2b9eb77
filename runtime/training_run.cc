#include "runtime/training_run.h"

#include <cstdio>
#include <map>
#include <thread>

#include "core/gpu.h"
#include "parallel/gather_blobs.h"
#include "parallel/gpu_choice.h"
#include "runtime/checkpoint_reader.h"
#include "runtime/model_kind.h"
#include "runtime/plan.h"
#include "runtime/run_folder.h"
#include "runtime/weights.h"

namespace moemamba {

namespace {

TrainerOptions options_of(const TrainRequest& request, const std::optional<Tokenizer>& tokenizer) {
  const ModelSizes sizes =
      model_sizes(request.model, vocabulary_of(tokenizer), request.train.sequence_length());
  TrainerOptions options = trainer_options(sizes, request.parallel, request.train);
  options.data.files = {request.data.train().begin(), request.data.train().end()};
  options.data.end_of_document = end_of_document_of(tokenizer);
  options.data.sampling =
      request.data.sampling() == DataConfig::CIRCULAR ? Sampling::circular : Sampling::epochs;
  options.threads = request.threads;
  options.spoil = request.spoil;
  options.before_step = request.before_step;
  options.before_verdict = request.before_verdict;
  return options;
}

TrainerOptions fitting_options(const ProcessGroups& groups, const TrainRequest& request,
                               const std::optional<Tokenizer>& tokenizer) {
  const TrainerOptions options = options_of(request, tokenizer);
  if (groups.device == DeviceKind::cuda)
    check_gpu_memory(options, groups.layout, gpu::free_bytes());
  return options;
}

// What the ranks compute on, for people: every kind of GPU once. All ranks call it.
std::string devices_text(ProcessGroups& groups, Stream& host) {
  if (groups.device == DeviceKind::cpu) return "";
  const std::string own = gpu::devices()[size_t(gpu::used())].name;
  return gpu_kinds_text(gather_blobs(*groups.control, host, own)) + ", " + gpu::build();
}

std::string metrics_path(const std::string& run) {
  return join_path(run, "metrics.jsonl");
}

std::string samples_path(const std::string& run) {
  return join_path(run, "samples.jsonl");
}

}  // namespace

TrainingRun::TrainingRun(FileSystem& files, ProcessGroups& groups, const TrainRequest& request)
    : files_(files),
      groups_(groups),
      request_(request),
      tokenizer_(checked_tokenizer(request.data, request.model, true)),
      trainer_(groups, fitting_options(groups, request, tokenizer_)),
      hasher_(groups, trainer_.session().store) {
  open_evaluation();
  // Before anything is written: they may not fit.
  const bool goes_on = !request.init_from.empty() && has_own_checkpoint();
  if (!goes_on) take_weights();
  barrier(*groups.control, trainer_.session().host);
  devices_ = devices_text(groups, trainer_.session().host);
  take_folder();
  if (goes_on && loaded_step_ < 0) take_weights();  // somebody has removed it meanwhile
  open_reports();
  open_checkpoints();
}

// Then there is no need to read other weights, which may be large or, by now, damaged or gone.
bool TrainingRun::has_own_checkpoint() {
  const bool own = speaks() && !request_.overwrite && holds_run(request_.run) &&
                   !list_checkpoints(request_.run).empty();
  return !broadcast_blob(*groups_.control, trainer_.session().host, own ? "yes" : "").empty();
}

// Of --init-from.
void TrainingRun::take_weights() {
  if (request_.init_from.empty()) return;
  const InPhase in_phase(groups_.activity, Phase::loading);
  Session& session = trainer_.session();
  const FoundWeights found = find_weights(request_.init_from, groups_, session.host);
  load_weights(found.path, session.store, groups_);
  session.store.values_changed();
  check_same_kind(found.path, request_.model, tokenizer_);
  say("weights    " + describe(found));
}

void TrainingRun::say(const std::string& line) {
  if (!speaks()) return;
  if (progress_)
    progress_->say(line);
  else if (request_.train.progress() != TrainConfig::OFF)
    std::fprintf(stderr, "%s\n", line.c_str());
}

// What nobody should miss who has turned the progress line off.
void TrainingRun::warn(const std::string& line) {
  if (speaks() && !progress_)
    std::fprintf(stderr, "moemamba: %s\n", line.c_str());
  else
    say(line);
}

void TrainingRun::open_evaluation() {
  const DataConfig& data = request_.data;
  const bool holds_out = data.validation_size() > 0;
  const auto& files = holds_out ? data.validation() : data.train();
  HeldOut held_out = open_held_out({files.begin(), files.end()});
  bytes_per_token_ = double(held_out.bytes) / double(held_out.tokens());
  if (!holds_out) return;
  const TrainConfig& train = request_.train;
  if (train.sample_tokens() > 0) {
    check(tokenizer_.has_value(),
          "train.sample_tokens: data.tokenizer is \"none\", which makes no ",
          "text of ids; take 0");
    samples_.emplace(trainer_.session(), *tokenizer_, held_out,
                     SamplesOptions{.tokens = train.sample_tokens(),
                                    .prompt = train.sample_prompt(),
                                    .seed = train.seed()});
  }
  evaluator_.emplace(trainer_.session(), std::move(held_out), evaluator_options(train, tokenizer_));
}

// Rank 0 takes the folder under a lease and finds out whether the run begins or goes on; all ranks
// learn it, and what they need to write later.
void TrainingRun::take_folder() {
  std::string facts;  // "resume|new GENERATION RUN-ID"
  Stream& stream = trainer_.session().host;
  if (speaks()) {
    const auto there = [&] {
      const bool holds = holds_run(request_.run);
      check(!holds || !request_.fresh, taken_text(request_.run, "--fresh wants an empty folder"));
      return holds;
    };
    there();  // before anything is written
    const auto lifetime =
        std::chrono::milliseconds(int64_t(request_.checkpoint.lease_seconds() * 1e3));
    if (!request_.lease_generation)
      lease_ = std::make_unique<Lease>(files_, request_.run, Lease::Options{.lifetime = lifetime});
    const bool resumes = there() && !request_.overwrite;  // another may have begun it meanwhile
    if (!resumes)
      claim_run_folder(files_, request_.run, request_.resolved_text, request_.overwrite);
    facts = concat(resumes ? "resume " : "new ",
                   lease_ ? lease_->generation() : request_.lease_generation(), " ", fresh_nonce());
  }
  facts = broadcast_blob(*groups_.control, stream, facts);
  const size_t first = facts.find(' '), second = facts.rfind(' ');
  generation_ = std::stoll(facts.substr(first + 1, second - first - 1));
  run_id_ = facts.substr(second + 1);
  if (facts.rfind("resume", 0) == 0) resume();
  if (speaks() && tokenizer_ && tokenizer_->kind() == TokenizerKind::bpe)
    tokenizer_->save(files_, join_path(request_.run, "tokenizer.model"));
}

// The newest checkpoint that holds, if there is one: state, hash chain and what is known of it.
std::optional<CheckpointManifest> TrainingRun::load(std::string_view heading) {
  const InPhase in_phase(groups_.activity, Phase::loading);
  Session& session = trainer_.session();
  auto found = load_newest(files_, groups_, session.host, session.store,
                           {.run = request_.run,
                            .generation = generation_,
                            .say = [this](const std::string& text) { say(text); },
                            .heading = heading,
                            .may_write = [this] { return may_write(); }});
  if (!found) return found;
  session.store.values_changed();
  const uint64_t hash = hasher_.take(session.compute);
  check(hash == found->state_hash(), request_.run, ": what was loaded has the hash ",
        state_hash_text(hash), ", what was saved ", state_hash_text(found->state_hash()),
        "; please report this");
  loaded_step_ = found->step();
  if (checkpoints_) checkpoints_->loaded(loaded_step_);
  last_loss_ = found->loss();
  chain_.resume(found->chain());
  return found;
}

void TrainingRun::resume() {
  const auto found = load("resumed    ");
  if (!found) {
    const auto refuse_to_begin = [&](const std::string& why) {
      throw RunEnds(taken_text(request_.run, why));
    };
    // All that it had may have been found damaged, and be mended by hand.
    if (const auto damaged = list_damaged(request_.run); !damaged.empty())
      refuse_to_begin(concat("of its checkpoints only damaged ones are left, the newest is ",
                             "checkpoints/", damaged[0], "; one that is repaired must get back ",
                             "its name, without what is behind the number"));
    // It ended before its first checkpoint; but what has weights is not begun again unasked.
    if (file_exists(join_path(request_.run, "weights")))
      refuse_to_begin("it has no checkpoints from which it could go on");
    say("resumed    no checkpoint is there yet: from step 1");
  } else {
    check(found->step() < request_.train.steps() || !has_weights_of(found->step()),
          taken_text(request_.run,
                     concat("it is finished: step ", found->step(), " of ", request_.train.steps(),
                            "; with more train.steps it goes on")));
    const std::string tokenizer = describe_tokenizer(tokenizer_);
    check(found->tokenizer() == tokenizer, request_.run, ": was trained with tokenizer ",
          found->tokenizer(), ", found ", tokenizer, "; give data.tokenizer as it was");
    first_step_ = found->step();
    run_id_ = found->run_id();
    note("resumed", first_step_, concat("goes on after step ", first_step_));
  }
  if (!speaks()) return;
  check_may_write();
  write_file(files_, join_path(request_.run, "config.textproto"), request_.resolved_text);
  cut_lines(files_, metrics_path(request_.run), first_step_);
  cut_lines(files_, samples_path(request_.run), first_step_);
}

void TrainingRun::open_reports() {
  if (!speaks()) return;
  const TrainConfig& train = request_.train;
  metrics_.emplace(files_, metrics_path(request_.run));
  if (samples_) sample_lines_.emplace(files_, samples_path(request_.run), "samples");
  if (train.tensorboard()) tensorboard_.emplace(files_, request_.run, first_step_);
  if (train.progress() == TrainConfig::OFF) return;
  const ModelSizes& sizes = trainer_.session().model.sizes();
  progress_.emplace(
      stderr, ProgressOptions{.steps = train.steps(),
                              .experts = sizes.routers() * sizes.E,
                              .routed_rows = int64_t(train.global_batch_size()) *
                                             train.sequence_length() * sizes.K * sizes.routers(),
                              .bytes_per_token = bytes_per_token_,
                              .terminal = request_.terminal || train.progress() == TrainConfig::ON,
                              .color = request_.color,
                              .steps_between_lines = train.log_interval(),
                              .columns = request_.columns});
}

void TrainingRun::open_checkpoints() {
  const CheckpointConfig& config = request_.checkpoint;
  Checkpoints::Options options{
      .writer = {.run = request_.run, .generation = generation_, .may_write = {}},
      .asynchronous = config.asynchronous(),
      .verify = config.verify(),
      .retention = {.keep_last = config.keep_last(), .keep_every = config.keep_every()},
      .max_failed = config.max_failed_saves(),
      .say = [this](const std::string& text) { say(text); },
      .warn = [this](const std::string& text) { warn(text); },
      .on_end = [this](const Checkpoints::Ended& save) { note_save(save); }};
  if (speaks()) options.writer.may_write = [this] { return may_write(); };
  checkpoints_.emplace(files_, groups_, trainer_.session().store, std::move(options));
  if (loaded_step_ >= 0) checkpoints_->loaded(loaded_step_);
}

// On rank 0: this launch still has the lease, or its supervisor has.
bool TrainingRun::may_write() const {
  if (lease_) return lease_->ours();
  // One that takes over has its lease a moment before its ranks hear of it.
  constexpr std::chrono::milliseconds kPatience(3000), kPause(10);
  for (auto waited = kPause * 0; waited < kPatience; waited += kPause) {
    if (newest_lease(request_.run) == request_.lease_generation()) return true;
    std::this_thread::sleep_for(kPause);
  }
  return false;
}

// What is in the folder is a successor's, if there is one.
void TrainingRun::check_may_write() const {
  check(!speaks() || may_write(), request_.run, ": another launch has taken over this run");
}

TrainResult TrainingRun::go() {
  introduce();
  // It was cut off between its last checkpoint and its weights.
  if (loaded_step_ >= request_.train.steps()) conclude(loaded_step_);
  int64_t k = first_step_;
  for (; k < request_.train.steps() && !trainer_.stopping(); ++k) {
    if (request_.stop_wanted && request_.stop_wanted()) trainer_.ask_to_stop();
    StepRecord record = trainer_.step(k);
    if (trainer_.skipped())
      if (const std::optional<int64_t> back = mend(record)) {
        k = *back - 1;
        continue;
      }
    after_step(record);
  }
  checkpoints_->finish();
  if (request_.train.steps() == 0) save_weights_of(0);
  finish();
  return {.evaluation = evaluation_, .stopped = k < request_.train.steps()};
}

TrainResult run_training(FileSystem& files, ProcessGroups& groups, const TrainRequest& request) {
  check(request.data.train_size() > 0,
        "data.train: no token file; make one with `moemamba prepare`, then --data.train=FILE");
  return TrainingRun(files, groups, request).go();
}

}  // namespace moemamba
