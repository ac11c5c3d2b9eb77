// What a training run says and writes around its steps.
#include <cstdio>
#include <limits>

#include "model/counts.h"
#include "parallel/gather_blobs.h"
#include "runtime/model_kind.h"
#include "runtime/plot.h"
#include "runtime/training_run.h"
#include "runtime/weights.h"

namespace moemamba {

void TrainingRun::introduce() {
  const std::string idle = idle_ranks_warning(
      request_.train.global_batch_size(), request_.train.routing_group(), groups_.layout.ranks());
  if (speaks() && !idle.empty()) std::fprintf(stderr, "moemamba: %s\n", idle.c_str());
  if (!progress_) return;
  Session& session = trainer_.session();
  const ModelSizes& s = session.model.sizes();
  const RankLayout& layout = groups_.layout;
  const ModelCounts counts = count_model(s);
  progress_->say(concat("model      ", s.blocks, " blocks of (", s.pattern_text(), "), ",
                        s.E ? concat(s.E, " experts x top-", s.K, ", ") : "", "width ", s.D,
                        ", vocabulary ", s.V));
  progress_->say(concat("parameters ", counts.total, " in all, ", counts.active,
                        " active per token, and ", counts.embedding_and_head,
                        " in embedding and head"));
  if (!devices_.empty()) progress_->say("device     " + devices_);
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

void TrainingRun::evaluate(StepRecord& record) {
  trainer_.wait_weights();
  evaluation_ = evaluator_->run();
  record.val_loss = evaluation_->loss;
  record.val_bpb = evaluation_->bits_per_byte;
  if (samples_) write_sample(record.step);
  char text[160];
  std::snprintf(text, sizeof text, "held-out loss %.4f after step %lld", evaluation_->loss,
                static_cast<long long>(record.step + 1));
  note("evaluated", record.step, text);
  if (!progress_) return;
  int length = std::snprintf(text, sizeof text, "held-out   after step %lld: loss %.4f",
                             static_cast<long long>(record.step + 1), evaluation_->loss);
  if (evaluation_->bits_per_byte)
    length += std::snprintf(text + length, sizeof text - size_t(length), ", %.4f bits per byte",
                            *evaluation_->bits_per_byte);
  progress_->say(std::string_view(text, size_t(length)));
}

void TrainingRun::note(const char* kind, int64_t step, const std::string& text, double seconds) {
  if (!speaks() || !request_.on_event) return;
  RunEvent event;
  event.set_kind(kind);
  event.set_step(step);
  event.set_text(text);
  if (seconds > 0) event.set_seconds(seconds);
  request_.on_event(event);
}

void TrainingRun::note_save(const Checkpoints::Ended& save) {
  const std::string which = concat("the checkpoint after step ", save.step);
  if (save.problem.empty())
    note("saved", save.step, which + " is there", save.seconds);
  else
    note("save_failed", save.step, concat(which, " could not be saved: ", save.problem));
}

void TrainingRun::write_sample(int64_t k) {
  const InPhase in_phase(groups_.activity, Phase::evaluation);
  const std::string text = samples_->take();
  if (!sample_lines_) return;
  const std::string line = sample_line(k, samples_->prompt(), text);
  sample_lines_->add(line.data(), line.size());
}

// The step's link in the hash chain, and now and then a hash of all that the steps have made. Of a
// step that was left out nothing remains, so its numbers are none, whichever of them was not
// finite.
void TrainingRun::link(StepRecord& record) {
  const int64_t batch = request_.train.global_batch_size();
  constexpr double kNone = std::numeric_limits<double>::quiet_NaN();
  chain_.add({.step = record.step,
              .loss = record.skipped ? kNone : record.loss,
              .grad_norm = record.skipped ? kNone : record.grad_norm,
              .first_sample = record.step * batch,
              .samples = batch});
  record.chain = chain_.text();
  const int64_t interval = request_.checkpoint.hash_interval();
  if (interval == 0 || (record.step + 1) % interval != 0) return;
  trainer_.wait_weights();
  record.state_hash = hasher_.take(trainer_.session().compute);
}

void TrainingRun::save_checkpoint(int64_t done) {
  trainer_.wait_weights();
  CheckpointFacts facts{.step = done,
                        .next_sample = done * request_.train.global_batch_size(),
                        .loss = last_loss_,
                        .chain = chain_.text().data(),
                        .run_id = run_id_,
                        .config = request_.resolved_text,
                        .tokenizer = describe_tokenizer(tokenizer_),
                        .build = request_.build,
                        .metadata = describe_kind(request_.model, tokenizer_),
                        .extra_files = {}};
  facts.metadata["config"] = request_.resolved_text;
  // From memory: where the run's file cannot be read, that must not end the training.
  if (speaks() && tokenizer_ && tokenizer_->kind() == TokenizerKind::bpe)
    facts.extra_files.emplace_back("tokenizer.model", tokenizer_->content());
  trainer_.hold_state(checkpoints_->save(std::move(facts), &trainer_.session().compute));
}

void TrainingRun::save_weights_of(int64_t step) {
  const InPhase in_phase(groups_.activity, Phase::finishing);
  check_may_write();
  Session& session = trainer_.session();
  WeightsMetadata metadata = describe_kind(request_.model, tokenizer_);
  metadata["config"] = request_.resolved_text;
  session.compute.synchronize();
  save_weights(files_, join_path(request_.run, "weights"), session.store, groups_, session.host,
               metadata, step);
}

bool TrainingRun::has_weights_of(int64_t step) const {
  const std::string folder = join_path(request_.run, "weights");
  if (!file_exists(folder)) return false;
  const WeightsMetadata metadata = read_weights_metadata(folder);
  const auto stored = metadata.find("step");
  return stored != metadata.end() && stored->second == std::to_string(step);
}

// What the last step leaves behind, made from its checkpoint.
void TrainingRun::conclude(int64_t step) {
  if (evaluator_) evaluation_ = evaluator_->run();
  save_weights_of(step);
}

void TrainingRun::after_step(StepRecord& record) {
  const TrainConfig& train = request_.train;
  const int64_t done = record.step + 1;
  const auto due = [&](int64_t interval) { return interval > 0 && done % interval == 0; };
  const bool last = done == train.steps(), stops = trainer_.stopping() && !last;
  check(!lease_ || !lease_->lost(), request_.run, ": another launch has taken over this run");
  checkpoints_->announce();
  record.failed_saves = checkpoints_->failed();
  record.skipped_steps = skipped_steps_;
  if (const auto trouble = troubles_.find(record.step); trouble != troubles_.end())
    record.replays = trouble->second.failures - record.skipped;
  if (!record.skipped) skipped_in_a_row_ = 0, last_loss_ = record.loss;
  if (request_.on_step) request_.on_step(record, trainer_.expert_counts());
  if (progress_) progress_->update(record, last || stops);
  if (stops) note("stopping", record.step, concat("ending after step ", done, ", as asked"));
  if (evaluator_ && !stops && (due(train.eval_interval()) || last)) evaluate(record);
  link(record);
  if (metrics_) metrics_->record(record);
  if (tensorboard_) tensorboard_->record(record);
  // A run that diverges leaves out step after step; its saves would push out those from before.
  const bool saves = due(train.save_interval()) && !record.skipped;
  if (last || stops)
    end_after(done);
  else if (saves)
    save_checkpoint(done);
}

// The same command would begin this run, which has no checkpoint, anew: see resume().
bool TrainingRun::begins_anew() {
  std::string answer;
  if (speaks()) {
    try {
      const bool weights = file_exists(join_path(request_.run, "weights"));
      if (!weights && list_damaged(request_.run).empty()) answer = "yes";
    } catch (const std::exception&) {  // nor could a launch look there
    }
  }
  return !broadcast_blob(*groups_.control, trainer_.session().host, answer).empty();
}

// The state is that of step `done`, which may be in a checkpoint already.
void TrainingRun::end_after(int64_t done) {
  const int64_t steps = request_.train.steps();
  // However many saves have failed, there are weights to write and words to say.
  checkpoints_->lift_limit();
  checkpoints_->finish();
  checkpoints_->look_again(done);
  const auto there = [&] { return checkpoints_->unread(done); };  // it keeps its name
  // Once more, for no later save makes good what a disk refused for a moment.
  for (int tries = 2; tries > 0 && checkpoints_->newest() != done && !there(); --tries) {
    save_checkpoint(done);
    checkpoints_->finish();
    checkpoints_->look_again(done);
  }
  const int64_t newest = checkpoints_->newest();
  const bool saved = newest == done, goes_on = there() || newest >= 0;
  const bool anew = !goes_on && done < steps && begins_anew();
  if (!anew) save_weights_of(done);
  const std::string weights = join_path(request_.run, "weights"),
                    failed = concat(
                        "step ", done, " of ", steps,
                        there() ? ": " : " could not be saved, twice: ", checkpoints_->problem()),
                    command = request_.overwrite && !request_.lease_generation
                                  ? "the same command with --overwrite=false"
                                  : "the same command",
                    next = there() ? command + " goes on with it once it can be read"
                                   : concat(command, " goes on after step ", newest);
  check(!anew, request_.run, ": ", failed, "; there is no checkpoint to go on from: once the disk ",
        "takes one, the same command begins anew");
  check(saved || (done < steps && goes_on), request_.run, ": ", failed, "; the weights are in ",
        weights, "; ",
        there() ? "the run is finished once it can be read"
        : goes_on
            ? "once the disk takes a checkpoint, " + next
            : concat("there is no checkpoint to go on from, but another --run can begin with ",
                     "--init-from=", weights));
  if (done == steps) return;
  const std::string text = concat("stopped    after step ", done, " of ", steps, ", as asked; ");
  if (saved)
    say(concat(text, command, " goes on with it; the weights are in ", weights));
  else
    warn(concat(text, failed, "; ", next, "; the weights are in ", weights));
}

void TrainingRun::finish() {
  if (groups_.activity) groups_.activity->enter(Phase::finishing);
  if (!speaks()) return;
  if (progress_) progress_->finish();
  if (metrics_->lost_lines() > 0)
    std::fprintf(stderr, "metrics: %lld of the run's lines were lost\n",
                 static_cast<long long>(metrics_->lost_lines()));
  if (tensorboard_ && tensorboard_->lost_records() > 0)
    std::fprintf(stderr, "tensorboard: %lld of the run's records were lost\n",
                 static_cast<long long>(tensorboard_->lost_records()));
  write_loss_svg(files_, request_.run);
  const int64_t experts = trainer_.session().model.sizes().E;
  const std::vector<double>& counts = evaluation_ ? evaluation_->counts : trainer_.expert_counts();
  if (experts > 0 && !counts.empty())
    write_file(files_, join_path(request_.run, "experts.txt"), expert_table(counts, experts));
}

}  // namespace moemamba
