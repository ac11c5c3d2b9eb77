#include "runtime/trainer.h"

#include <algorithm>
#include <chrono>
#include <cmath>

namespace moemamba {

namespace {

using Clock = std::chrono::steady_clock;
double since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Facts of a step that all ranks add up, in this order; the choices per router and expert follow.
enum Fact { kLoss, kBalance, kZ, kDropped, kNotANumber, kSquares, kStop, kFacts };

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
  const StepBuffers b = step_buffers(options, share_.micro_batch, groups.layout.ranks());
  ids_ = Buffer(DeviceKind::cpu, b.ids);
  targets_ = Buffer(DeviceKind::cpu, b.targets);
  starts_ = Buffer(DeviceKind::cpu, b.starts);
  facts_buffer_ = Buffer(DeviceKind::cpu, b.facts);
  gather_buffer_ = Buffer(DeviceKind::cpu, b.gathered);
  small_ = Buffer(DeviceKind::cpu, b.small);
  facts_tensor_ = view(facts_buffer_.data(), {kFacts + choices}, DType::f64);
  verdict_ = view(small_.data(), {2}, DType::f32);
  squares_ = view(small_.data() + 16, {1}, DType::f64);
  facts_.counts.resize(size_t(choices));
  counts_.resize(size_t(choices));
  session_.store.initialise(options.seed);
}

Trainer::~Trainer() {
  try {
    session_.communication.synchronize();
  } catch (const std::exception&) {
    // Came out of step() before.
  }
}

void Trainer::micro_batch(int64_t k, int64_t index, StepSeconds& seconds) {
  const int64_t L = options_.data.sequence_length;
  const int64_t before = index * share_.micro_batch;
  const int64_t count = std::clamp<int64_t>(share_.count - before, 0, share_.micro_batch);
  const double global_tokens = double(options_.data.global_batch * L);
  const double groups = double(options_.data.global_batch / options_.routing_group);
  const double routers = double(std::max<int64_t>(1, options_.sizes.routers()));
  auto start = Clock::now();
  auto* ids = reinterpret_cast<int32_t*>(ids_.data());
  auto* targets = reinterpret_cast<int32_t*>(targets_.data());
  auto* starts = reinterpret_cast<uint8_t*>(starts_.data());
  data_.fill(k, share_.first + before, count, ids, targets, starts);
  seconds.data += since(start);

  start = Clock::now();
  Step step = session_.begin(count, options_.routing_group);
  step.facts = &facts_;
  step.accumulate = index > 0;
  if (options_.sizes.reset_at_documents) step.starts = view(starts, {count * L});
  step.balance_scale = float(options_.sizes.balance_loss / (groups * routers));
  step.z_scale = float(options_.sizes.z_loss / (groups * routers));
  const Tensor loss = step.arena.take({count * L}, DType::f32, "loss");
  const Tensor id_tensor = view(ids, {count * L});
  session_.model.forward(step, id_tensor, session_.saved, &buckets_);
  session_.model.loss(step, view(targets, {count * L}), loss, float(1 / global_tokens), true,
                      session_.saved);
  for (int64_t t = 0; t < count * L; ++t) loss_sum_ += double(loss.as<float>()[t]);
  const double forward_exchange = session_.exchange.take_seconds();
  seconds.forward += since(start) - forward_exchange;

  start = Clock::now();
  const bool last = index + 1 == share_.micro_batches;
  session_.model.backward(step, id_tensor, session_.saved, last ? &buckets_ : nullptr);
  const double backward_exchange = session_.exchange.take_seconds();
  seconds.backward += since(start) - backward_exchange;
  seconds.exchange += forward_exchange + backward_exchange;
}

void Trainer::share_facts(StepRecord& record) {
  double* facts = facts_tensor_.as<double>();
  facts[kLoss] = loss_sum_;
  facts[kBalance] = facts_.balance;
  facts[kZ] = facts_.z;
  facts[kDropped] = facts_.dropped;
  facts[kNotANumber] = facts_.not_a_number;
  optimizer_.sum_of_squares(session_.compute, squares_);
  facts[kSquares] = squares_.as<double>()[0];
  facts[kStop] = stop_wanted_;
  std::copy(facts_.counts.begin(), facts_.counts.end(), facts + kFacts);
  all_reduce_sum(*session_.groups.control, session_.compute, facts_tensor_,
                 view(gather_buffer_.data(), {session_.groups.layout.ranks(), facts_tensor_.cols()},
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
                      facts_tensor_.as<double>()[kNotANumber] == 0;
  float* verdict = verdict_.as<float>();
  verdict[0] = clip > 0 && record.grad_norm > clip ? float(clip / record.grad_norm) : 1.f;
  verdict[1] = finite ? 1.f : 0.f;
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

StepRecord Trainer::take_step(int64_t k) {
  const auto start = Clock::now();
  StepRecord record;
  record.step = k;
  record.lr = learning_rate(options_.optimizer, k);
  loss_sum_ = 0;
  std::fill(facts_.counts.begin(), facts_.counts.end(), 0.0);
  facts_.balance = facts_.z = facts_.dropped = facts_.not_a_number = 0;
  for (int64_t i = 0; i < share_.micro_batches; ++i) micro_batch(k, i, record.seconds);

  auto phase = Clock::now();
  buckets_.finish(session_.compute);
  record.seconds.reduction = since(phase);
  phase = Clock::now();
  share_facts(record);
  judge(record);
  optimizer_.update(session_.compute, verdict_, k);
  if (!skipped_) session_.model.balance_routers(counts_);
  buckets_.gather_weights(session_.compute);
  record.seconds.optimizer = since(phase);
  record.tokens_per_second =
      double(options_.data.global_batch * options_.data.sequence_length) / since(start);
  return record;
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

}  // namespace moemamba
