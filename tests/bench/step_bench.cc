#include <array>
#include <map>

#include "core/schema.h"
#include "launcher/run_config.pb.h"
#include "tests/bench/bench.h"
#include "tests/support/in_world.h"
#include "tests/support/training.h"

// A training step of the quickstart's model on one rank and one core. Its ceiling is SGEMM on the
// products' FLOPs alone; the rest of the line says which operators had the time.
namespace moemamba {
namespace {

constexpr int64_t kVocabulary = 4096;

TrainerOptions quickstart_options(int64_t micro_batches) {
  RunConfig config;
  Settings settings(config);
  settings.read_file(MOEMAMBA_SOURCE_DIR "/configs/quickstart.textproto");
  settings.throw_problems();
  const TrainConfig& train = config.train();
  TrainerOptions options;
  options.sizes = model_sizes(config.model(), kVocabulary);
  options.optimizer = optimizer_settings(train);
  options.data.files = {synthetic_tokens(kVocabulary)};
  options.data.vocabulary = kVocabulary;
  options.data.sequence_length = train.sequence_length();
  options.data.global_batch = train.global_batch_size();
  options.data.seed = train.seed();
  options.micro_batch = train.global_batch_size() / micro_batches;
  options.routing_group = train.routing_group();
  options.exchange_rows = config.parallel().exchange_rows();
  return options;
}

// Seconds of each family of operators; what an operator holds of another family is that family's.
class FamilySeconds : public StreamObserver {
 public:
  void begin(const char* work) override {
    charge();
    open_[size_t(depth_++)] = &seconds_[family_of(work)];
  }
  void end() override {
    charge();
    --depth_;
  }
  const std::map<std::string, double>& seconds() const { return seconds_; }

 private:
  static std::string family_of(const std::string& work) {
    static const std::map<std::string, std::string> families = {
        {"matmul", "matmul"},
        {"grouped_matmul", "matmul"},
        {"grouped_outer", "matmul"},
        {"head_cross_entropy", "head_matmul"},
        {"cross_entropy", "cross_entropy"},
        {"scan_forward", "scan"},
        {"scan_backward", "scan"},
        {"conv_forward", "conv"},
        {"conv_backward", "conv"},
        {"activation_forward", "pointwise"},
        {"activation_backward", "pointwise"},
        {"swiglu_forward", "pointwise"},
        {"swiglu_backward", "pointwise"},
        {"add", "pointwise"},
        {"add_bias", "pointwise"},
        {"bias_backward", "pointwise"},
        {"rope", "pointwise"},
        {"attention_forward", "attention"},
        {"attention_backward", "attention"},
        {"norm_forward", "norm"},
        {"norm_backward", "norm"},
        {"embedding_forward", "embedding"},
        {"embedding_backward", "embedding"},
        {"route", "routing"},
        {"route_backward", "routing"},
        {"permute", "routing"},
        {"permute_backward", "routing"},
        {"unpermute", "routing"},
        {"unpermute_backward", "routing"},
        {"exchange", "exchange"},
        {"adamw", "adamw"},
        {"sum_of_squares", "adamw"},
    };
    const auto found = families.find(work);
    return found == families.end() ? work : found->second;
  }
  void charge() {
    const double now = compute_seconds();
    if (depth_ > 0) *open_[size_t(depth_ - 1)] += now - since_;
    since_ = now;
  }
  std::map<std::string, double> seconds_;
  std::array<double*, 4> open_{};
  int depth_ = 0;
  double since_ = 0;
};

// One product of the ceiling after every step, so that both see the same clock and neighbours.
void measure_steps(benchmark::State& state, Ceiling& ceiling, Trainer& trainer) {
  FamilySeconds families;
  int64_t k = 0;
  for (; k < 2; ++k) trainer.step(k);
  trainer.session().compute.observe(&families);
  double steps = 0, products = 0;
  for (auto _ : state) {
    const double start = compute_seconds();
    trainer.step(k++);
    const double seconds = compute_seconds() - start;
    state.SetIterationTime(seconds);
    steps += seconds;
    products += ceiling.seconds();
  }
  trainer.session().compute.observe(nullptr);
  const TrainerOptions& options = trainer.options();
  const double count = double(state.iterations());
  const double tokens = double(options.data.global_batch * options.data.sequence_length);
  const double sgemm = Ceiling::kFlops * count / products;
  const double flops = options.sizes.matmul_flops_per_token() * tokens * count / steps;
  state.counters["GFLOP/s"] = flops * 1e-9;
  state.counters["of_sgemm"] = flops / sgemm;
  state.counters["tokens/s"] = tokens * count / steps;
  double known = 0;
  for (const auto& [family, seconds] : families.seconds()) {
    state.counters["%" + family] = 100 * seconds / steps;
    known += seconds;
  }
  state.counters["%other"] = 100 * (steps - known) / steps;
}

}  // namespace

void add_step_benchmarks(Ceiling& ceiling) {
  const auto run = [&](benchmark::State& state) {
    const TrainerOptions options = quickstart_options(state.range(0));
    in_world(RankLayout(1, 1, int(options.sizes.E)), [&](ProcessGroups& groups) {
      Trainer trainer(groups, options);
      measure_steps(state, ceiling, trainer);
    });
  };
  benchmark::RegisterBenchmark("Step", run)
      ->ArgName("micro_batches")
      ->Arg(1)  // the whole batch at once
      ->Arg(2)  // as much at once as each of the quickstart's two ranks has
      ->UseManualTime()
      ->Unit(benchmark::kMillisecond);
}

}  // namespace moemamba
