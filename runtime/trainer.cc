#include "runtime/trainer.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <utility>

#include "core/gpu.h"
#include "core/host_mirror.h"
#include "kernels/adamw.h"
#include "kernels/pointwise.h"

namespace moemamba {

namespace {

using Clock = std::chrono::steady_clock;
double since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Facts of a step that all ranks add up, in this order; the choices per router and expert follow.
// Balance to NaN are RoutingFacts::sums.
enum Fact { kLoss, kBalance, kZ, kDropped, kNotANumber, kSquares, kStop, kFacts };

// What was not finite on a rank in a step, from cause to consequence.
enum Trouble : int32_t { kBadLogits = 1, kBadLoss = 2, kBadGradient = 4, kBadSum = 8 };

// "gradient of ranks 0, 2": the ranks that have it; empty: none.
std::string ranks_with(Trouble trouble, const char* what, const std::vector<int32_t>& of_ranks) {
  std::string ranks;
  int count = 0;
  for (size_t r = 0; r < of_ranks.size(); ++r)
    if (of_ranks[r] & trouble) ranks += concat(count++ ? ", " : "", r);
  return count == 0 ? "" : concat(what, count == 1 ? " of rank " : " of ranks ", ranks);
}

// The host's side of a micro-batch: ids, targets, starts.
int64_t slot_bytes(const StepBuffers& b) {
  return b.ids + b.targets + (b.starts + 15) / 16 * 16;
}

}  // namespace

OptimizerSettings optimizer_settings(const TrainConfig& c) {
  return {.lr = c.lr(),
          .final_lr_fraction = c.final_lr_fraction(),
          .warmup_steps = c.warmup_steps() ? c.warmup_steps() : c.steps() / 100,
          .steps = c.steps(),
          .beta1 = c.beta1(),
          .beta2 = c.beta2(),
          .eps = c.adam_eps(),
          .weight_decay = c.weight_decay(),
          .grad_clip = c.grad_clip()};
}

TrainerOptions trainer_options(const ModelSizes& sizes, const ParallelConfig& parallel,
                               const TrainConfig& train) {
  TrainerOptions options;
  options.sizes = sizes;
  options.optimizer = optimizer_settings(train);
  options.data.vocabulary = sizes.V;
  options.data.sequence_length = train.sequence_length();
  options.data.global_batch = train.global_batch_size();
  options.data.seed = train.seed();
  options.micro_batch = train.micro_batch_size();
  options.routing_group = train.routing_group();
  options.sample_tokens = train.sample_tokens();
  options.exchange_rows = parallel.exchange_rows();
  options.seed = train.seed();
  return options;
}

StepBuffers step_buffers(const TrainerOptions& options, int64_t micro_batch, int ranks) {
  const int64_t T = micro_batch * options.data.sequence_length;
  const int64_t facts = (kFacts + options.sizes.routers() * options.sizes.E) * 8;
  return {.ids = T * 4,
          .targets = T * 4,
          .starts = T,
          .facts = facts,
          .gathered = facts * ranks,
          .small = 64};
}

void describe_load(const std::vector<double>& counts, int64_t experts, StepRecord& record) {
  for (size_t first = 0; experts > 0 && first < counts.size(); first += size_t(experts)) {
    double sum = 0, most = 0;
    for (size_t e = first; e < first + size_t(experts); ++e) {
      sum += counts[e];
      most = std::max(most, counts[e]);
      record.dead_experts += counts[e] == 0;
    }
    if (sum > 0)
      record.load_max_over_mean = std::max(record.load_max_over_mean, most * double(experts) / sum);
  }
}

Trainer::Trainer(ProcessGroups& groups, const TrainerOptions& options)
    : options_(options),
      share_(share_of_batch(options.data.global_batch, options.routing_group, options.micro_batch,
                            groups.rank, groups.layout.ranks())),
      session_(groups, options.sizes, options.threads, share_.micro_batch,
               options.data.sequence_length, options.exchange_rows, Session::Memory::training),
      buckets_(session_.store.buckets(), session_.communication),
      optimizer_(options.optimizer, session_.store, buckets_),
      data_(options.data) {
  const int64_t choices = options.sizes.routers() * options.sizes.E;
  const DeviceKind device = groups.device;
  const StepBuffers b = step_buffers(options, share_.micro_batch, groups.layout.ranks());
  ids_ = Buffer(device, b.ids);
  targets_ = Buffer(device, b.targets);
  starts_ = Buffer(device, b.starts);
  facts_buffer_ = Buffer(device, b.facts);
  gather_buffer_ = Buffer(DeviceKind::cpu, b.gathered);
  small_ = Buffer(device, b.small);
  facts_tensor_ = host_facts_ = view(facts_buffer_, 0, {kFacts + choices}, DType::f64);
  verdict_ = host_verdict_ = view(small_, 0, {2}, DType::f32);
  if (device == DeviceKind::cuda) {
    staging_ = Buffer::staging(device, b.facts + 16 + 2 * slot_bytes(b));
    host_facts_ = view(staging_.data(), {kFacts + choices}, DType::f64);
    host_verdict_ = view(staging_.data() + b.facts, {2}, DType::f32);
  }
  routing_.sums = view(facts_buffer_, kBalance * 8, {4}, DType::f64);
  if (choices > 0)
    routing_.choices =
        view(facts_buffer_, kFacts * 8, {options.sizes.routers(), options.sizes.E}, DType::f64);
  counts_.resize(size_t(choices));
  session_.store.initialise(options.seed, options.threads);
}

Trainer::~Trainer() {
  try {
    session_.communication.synchronize();
  } catch (const std::exception&) {
    // Came out of step() before.
  }
}

Trainer::Tokens Trainer::device_tokens(int64_t tokens) const {
  return {view(ids_, 0, {tokens}, DType::i32), view(targets_, 0, {tokens}, DType::i32),
          view(starts_, 0, {tokens}, DType::u8)};
}

Trainer::Tokens Trainer::host_tokens(int64_t tokens, int slot) const {
  if (!staging_.data()) return device_tokens(tokens);
  const StepBuffers b = step_buffers(options_, share_.micro_batch, session_.groups.layout.ranks());
  std::byte* at = staging_.data() + b.facts + 16 + slot * slot_bytes(b);
  return {view(at, {tokens}, DType::i32), view(at + b.ids, {tokens}, DType::i32),
          view(at + b.ids + b.targets, {tokens}, DType::u8)};
}

// On a GPU the copies run behind the work before; a slot is filled again when its copy is done.
Trainer::Tokens Trainer::fill_tokens(int64_t k, int64_t index, int64_t count) {
  const int64_t tokens = count * options_.data.sequence_length;
  const int64_t first = share_.first + index * share_.micro_batch;
  const int slot = int((k * share_.micro_batches + index) % 2);
  Stream::wait_on_host(uploaded_[slot]);
  const Tokens host = host_tokens(tokens, slot), device = device_tokens(tokens);
  data_.fill(k, first, count, host.ids.as<int32_t>(), host.targets.as<int32_t>(),
             host.starts.as<uint8_t>());
  if (!staging_.data()) return device;
  copy(session_.compute, host.ids, device.ids);
  copy(session_.compute, host.targets, device.targets);
  copy(session_.compute, host.starts, device.starts);
  uploaded_[slot] = session_.compute.record();
  return device;
}

void Trainer::micro_batch(int64_t k, int64_t index, StepSeconds& seconds) {
  const int64_t L = options_.data.sequence_length;
  const int64_t before = index * share_.micro_batch;
  const int64_t count = std::clamp<int64_t>(share_.count - before, 0, share_.micro_batch);
  const double global_tokens = double(options_.data.global_batch * L);
  const double groups = double(options_.data.global_batch / options_.routing_group);
  const double routers = double(std::max<int64_t>(1, options_.sizes.routers()));
  enter(Phase::data);
  auto start = Clock::now();
  const Tokens tokens = fill_tokens(k, index, count);
  seconds.data += since(start);

  enter(Phase::forward);
  start = Clock::now();
  Step step = session_.begin(count, options_.routing_group);
  step.facts = &routing_;
  step.accumulate = index > 0;
  if (options_.sizes.reset_at_documents) step.starts = tokens.starts;
  step.balance_scale = float(options_.sizes.balance_loss / (groups * routers));
  step.z_scale = float(options_.sizes.z_loss / (groups * routers));
  const Tensor loss = step.arena.take({count * L}, DType::f32, "loss");
  session_.model.forward(step, tokens.ids, session_.saved, &buckets_);
  session_.model.loss(step, tokens.targets, loss, float(1 / global_tokens), true, session_.saved);
  run(step.stream, Sum{.x = loss, .sum = fact(kLoss), .accumulate = true});
  const double forward_exchange = session_.exchange.take_seconds();
  seconds.forward += since(start) - forward_exchange;

  enter(Phase::backward);
  start = Clock::now();
  const bool last = index + 1 == share_.micro_batches;
  if (last && options_.spoil && options_.spoil(k)) spoil_gradient();
  session_.model.backward(step, tokens.ids, session_.saved, last ? &buckets_ : nullptr);
  const double backward_exchange = session_.exchange.take_seconds();
  seconds.backward += since(start) - backward_exchange;
  seconds.exchange += forward_exchange + backward_exchange;
}

Tensor Trainer::fact(int which) const {
  return view(facts_buffer_, which * 8, {1}, DType::f64);
}

// The one place where the host waits for a step's work: the facts of all ranks decide what the
// optimizer does.
void Trainer::share_facts(StepRecord& record) {
  optimizer_.sum_of_squares(session_.compute, fact(kSquares));
  if (staging_.data()) {
    copy(session_.compute, facts_tensor_, host_facts_);
    session_.compute.synchronize();
  }
  if (reduction_ends_) {
    const double seconds = gpu::seconds_between(reduction_begins_, reduction_ends_);
    session_.groups.activity->add_waited(std::chrono::nanoseconds(int64_t(seconds * 1e9)));
  }
  double* facts = host_facts_.as<double>();
  facts[kStop] = stop_wanted_;
  all_reduce_sum(*session_.groups.control, session_.host, host_facts_,
                 view(gather_buffer_.data(), {session_.groups.layout.ranks(), host_facts_.cols()},
                      DType::f64));
  const double groups = double(options_.data.global_batch / options_.routing_group);
  const double routers = double(std::max<int64_t>(1, options_.sizes.routers()));
  record.ce = facts[kLoss] / double(options_.data.global_batch * options_.data.sequence_length);
  record.balance_loss = options_.sizes.balance_loss * facts[kBalance] / (groups * routers);
  record.z_loss = options_.sizes.z_loss * facts[kZ] / (groups * routers);
  record.loss = record.ce + record.balance_loss + record.z_loss;
  record.grad_norm = std::sqrt(facts[kSquares]);
  record.dropped_rows = int64_t(facts[kDropped]);
  stopping_ = facts[kStop] > 0;
  std::copy(facts + kFacts, facts + kFacts + counts_.size(), counts_.begin());
  describe_load(counts_, options_.sizes.E, record);
}

void Trainer::judge(StepRecord& record) {
  const double clip = options_.optimizer.grad_clip;
  const bool finite = std::isfinite(record.loss) && std::isfinite(record.grad_norm) &&
                      host_facts_.as<double>()[kNotANumber] == 0;
  float* verdict = host_verdict_.as<float>();
  verdict[0] = clip > 0 && record.grad_norm > clip ? float(clip / record.grad_norm) : 1.f;
  verdict[1] = finite ? 1.f : 0.f;
  if (staging_.data()) copy(session_.compute, host_verdict_, verdict_);
  skipped_ = !finite;
}

StepRecord Trainer::step(int64_t k) {
  try {
    return take_step(k);
  } catch (const std::exception& error) {
    session_.groups.abort(error.what());
    throw;
  }
}

void Trainer::enter(Phase phase) const {
  if (session_.groups.activity) session_.groups.activity->enter(phase);
}

double Trainer::waited() const {
  const Activity* activity = session_.groups.activity;
  return activity ? std::chrono::duration<double>(activity->waited()).count() : 0;
}

// The host does not see how long a GPU waits here, so that one is measured where somebody asks.
void Trainer::wait_reduction(StepSeconds& seconds) {
  enter(Phase::reduction);
  const auto start = Clock::now();
  const bool measures = session_.groups.activity && staging_.data();
  if (measures) reduction_begins_ = gpu::mark(session_.compute);
  buckets_.finish(session_.compute);
  if (measures) reduction_ends_ = gpu::mark(session_.compute);
  seconds.reduction = since(start);
}

StepRecord Trainer::take_step(int64_t k) {
  if (session_.groups.activity) session_.groups.activity->begin_step(k);
  enter(Phase::data);
  if (options_.before_step) options_.before_step(k);
  const auto start = Clock::now();
  const double waited_before = waited();
  session_.exchange.take_rows();
  StepRecord record;
  record.step = k;
  record.lr = learning_rate(options_.optimizer, k);
  fill_zero(session_.compute, facts_tensor_);
  for (int64_t i = 0; i < share_.micro_batches; ++i) micro_batch(k, i, record.seconds);

  record.rows = session_.exchange.take_rows();
  wait_reduction(record.seconds);
  if (options_.before_verdict)
    options_.before_verdict(k, since(start) - (waited() - waited_before));
  const auto phase = Clock::now();
  share_facts(record);
  judge(record);
  enter(Phase::optimizer);
  session_.compute.wait(std::exchange(held_until_, {}));
  optimizer_.update(session_.compute, verdict_, k);
  if (!skipped_) session_.model.balance_routers(session_.compute, counts_);
  session_.store.values_changed();
  buckets_.gather_weights(session_.compute);
  record.seconds.optimizer = since(phase);
  record.seconds.all = since(start);
  record.seconds.waiting = waited() - waited_before;
  record.tokens_per_second =
      double(options_.data.global_batch * options_.data.sequence_length) / record.seconds.all;
  return record;
}

// The head's bucket has not been announced yet, and its gradient is written by now.
void Trainer::spoil_gradient() {
  const Tensor gradient = buckets_.bucket(buckets_.size() - 1).gradient;
  const Tensor first = gradient.column_range(0, 1).reshaped({1});
  HostMirror mirror(session_.groups.device);
  session_.compute.synchronize();
  const Tensor host = mirror.blank(first);
  host.as<float>()[0] = std::numeric_limits<float>::quiet_NaN();
  mirror.write_back(host, first);
}

// Reads the gradient once more, which only a step that went wrong is worth.
int32_t Trainer::own_trouble() {
  const double* facts = reinterpret_cast<const double*>(gather_buffer_.data()) +
                        session_.groups.rank * host_facts_.cols();
  int32_t trouble = facts[kNotANumber] == 0 ? 0 : kBadLogits;
  if (!std::isfinite(facts[kLoss] + facts[kBalance] + facts[kZ])) trouble |= kBadLoss;
  // A reduction leaves the sum over the ranks in a rank's own slice; around it there still is what
  // the rank itself has made.
  fill_zero(session_.compute, facts_tensor_);
  const auto add = [&](const Tensor& gradient, int64_t begin, int64_t end, Fact sum) {
    if (begin == end) return;
    run(session_.compute,
        SumOfSquares{.x = gradient.column_range(begin, end).reshaped({end - begin}),
                     .sum = fact(sum),
                     .accumulate = true});
  };
  for (int64_t i = 0; i < buckets_.size(); ++i) {
    const GradientBuckets::Bucket& bucket = buckets_.bucket(i);
    const int64_t P = bucket.gradient.elements(), N = bucket.group->size(), slice = P / N;
    const int64_t begin = bucket.group->rank() * slice, end = begin + slice;
    add(bucket.gradient, 0, begin, kLoss);
    add(bucket.gradient, begin, end, N == 1 ? kLoss : kSquares);
    add(bucket.gradient, end, P, kLoss);
  }
  if (staging_.data()) copy(session_.compute, facts_tensor_, host_facts_);
  session_.compute.synchronize();
  if (!std::isfinite(host_facts_.as<double>()[kLoss])) trouble |= kBadGradient;
  if (!std::isfinite(host_facts_.as<double>()[kSquares])) trouble |= kBadSum;
  return trouble;
}

std::string Trainer::blame() {
  const int32_t own = own_trouble();
  std::vector<int32_t> of_ranks(size_t(session_.groups.layout.ranks()));
  session_.groups.control->all_gather(session_.host, &own, of_ranks.data(), sizeof own);
  // What comes first explains the rest: a NaN spreads from logits to losses to gradients to sums.
  // A rank whose sum alone is not finite has itself made it so, or finite numbers became too large.
  const std::pair<Trouble, const char*> troubles[] = {{kBadLogits, "router logits"},
                                                      {kBadLoss, "loss"},
                                                      {kBadGradient, "gradient"},
                                                      {kBadSum, "gradient"}};
  for (const auto& [trouble, what] : troubles)
    if (std::string text = ranks_with(trouble, what, of_ranks); !text.empty()) return text;
  return "loss or gradient of all ranks together";
}

TrainerBytes Trainer::bytes() const {
  const ParameterStore::Bytes store = session_.store.bytes();
  TrainerBytes bytes{.values = store.values,
                     .gradients = store.gradients,
                     .moments = store.moments,
                     .reduction = buckets_.buffer_bytes(),
                     .activations = session_.arena.capacity(),
                     .batch = 0};
  for (const Buffer* buffer :
       {&ids_, &targets_, &starts_, &facts_buffer_, &gather_buffer_, &small_})
    bytes.batch += buffer->bytes();
  return bytes;
}

void Trainer::wait_weights() {
  for (int64_t i = 0; i < buckets_.size(); ++i) buckets_.wait_weights(i, session_.compute);
}

void Trainer::rest() {
  session_.communication.synchronize();
  session_.compute.synchronize();
}

}  // namespace moemamba
