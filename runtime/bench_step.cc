#include "runtime/bench_step.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>

#include "core/gpu.h"
#include "core/random.h"

namespace moemamba {

namespace {

using Clock = std::chrono::steady_clock;
constexpr int64_t kProfiledSteps = 3;

// The time between two marks is charged to the work that was innermost between them.
class WorkTimes : public StreamObserver {
 public:
  explicit WorkTimes(Stream& stream) : stream_(stream) {}
  void begin(const char* work) override {
    charge();
    open_.push_back(&times_[work]);
    ++open_.back()->calls;
  }
  void end() override {
    charge();
    open_.pop_back();
  }
  std::map<std::string, StepBench::Work> take(int64_t steps) {
    for (const auto& [work, from, to] : spans_) work->seconds += gpu::seconds_between(from, to);
    for (auto& [name, work] : times_) work.seconds /= double(steps), work.calls /= steps;
    return times_;
  }

 private:
  void charge() {
    if (stream_.device() == DeviceKind::cuda) {
      auto now = gpu::mark(stream_);
      if (!open_.empty()) spans_.push_back({open_.back(), last_, now});
      last_ = std::move(now);
      return;
    }
    const auto now = Clock::now();
    if (!open_.empty())
      open_.back()->seconds += std::chrono::duration<double>(now - last_time_).count();
    last_time_ = now;
  }
  struct Span {
    StepBench::Work* work;
    std::shared_ptr<void> from, to;
  };
  Stream& stream_;
  std::map<std::string, StepBench::Work> times_;
  std::vector<StepBench::Work*> open_;
  std::vector<Span> spans_;
  std::shared_ptr<void> last_;
  Clock::time_point last_time_;
};

}  // namespace

StepBench bench_step(ProcessGroups& groups, const TrainerOptions& options,
                     const StepBenchOptions& bench) {
  StepBench result;
  const bool on_gpu = groups.device == DeviceKind::cuda;
  const int64_t free_before = on_gpu ? gpu::free_bytes() : 0;
  result.ranks = groups.layout.ranks();
  {
    constexpr int64_t kRepeat = 5;
    Stream stream = on_gpu ? Stream::cuda() : Stream::immediate(options.threads);
    Stream host = Stream::immediate();
    barrier(*groups.control, host);
    result.ceiling = measure_product(stream, options.sizes.compute, kRepeat);
  }
  Trainer trainer(groups, options);
  Stream& compute = trainer.session().compute;
  int64_t k = 0;
  for (; k < bench.warmup; ++k) {
    const double loss = trainer.step(k).loss;
    if (k == 0) result.first_loss = loss;
  }
  auto last = Clock::now();
  for (int64_t i = 0; i < bench.steps; ++i, ++k) {
    result.last_loss = trainer.step(k).loss;
    const auto now = Clock::now();
    result.seconds.push_back(std::chrono::duration<double>(now - last).count());
    last = now;
  }
  std::sort(result.seconds.begin(), result.seconds.end());
  if (on_gpu) result.gpu_bytes = free_before - gpu::free_bytes();
  result.tokens = double(options.data.global_batch * options.data.sequence_length);
  result.flops = (options.sizes.matmul_flops_per_token() +
                  options.sizes.attention_flops_per_token(options.data.sequence_length)) *
                 result.tokens;
  if (!bench.profile) return result;
  compute.synchronize();
  WorkTimes times(compute);
  compute.observe(&times);
  last = Clock::now();
  for (int64_t i = 0; i < kProfiledSteps; ++i, ++k) trainer.step(k);
  compute.observe(nullptr);
  compute.synchronize();
  result.profiled =
      std::chrono::duration<double>(Clock::now() - last).count() / double(kProfiledSteps);
  result.work = times.take(kProfiledSteps);
  return result;
}

std::string step_bench_text(const StepBench& b) {
  char line[200];
  const auto at = [&](double share) {
    return b.seconds[size_t(share * double(b.seconds.size() - 1))] * 1e3;
  };
  const int digits = b.ceiling.rate < 1e13 ? 3 : 1;  // a CPU's are few
  std::snprintf(line, sizeof line,
                "step       %.2f ms (median of %zu; %.2f to %.2f)\n"
                "speed      %.0f tokens/s, %.*f TFLOP/s in products\n",
                b.median() * 1e3, b.seconds.size(), at(0), at(1), b.tokens / b.median(), digits,
                b.flops / b.median() * 1e-12);
  std::string text = line;
  std::snprintf(line, sizeof line, "ceiling    %.1f %% of %.*f TFLOP/s (%s, on %d %s)\n",
                100 * b.share(), digits, b.ceiling.rate * b.ranks * 1e-12,
                b.ceiling.multiplied.c_str(), b.ranks, b.ranks == 1 ? "rank" : "ranks");
  text += line;
  if (b.gpu_bytes > 0) {
    std::snprintf(line, sizeof line, "memory     %.2f GiB of this rank's GPU\n",
                  double(b.gpu_bytes) / double(1 << 30));
    text += line;
  }
  std::snprintf(line, sizeof line, "loss       %.4f at first, %.4f at last\n", b.first_loss,
                b.last_loss);
  text += line;
  if (b.work.empty()) return text;
  std::vector<std::pair<std::string, StepBench::Work>> sorted(b.work.begin(), b.work.end());
  std::ranges::stable_sort(sorted, [](const auto& a, const auto& c) {
    return a.second.seconds > c.second.seconds;
  });
  double known = 0;
  for (const auto& [name, work] : sorted) {
    known += work.seconds;
    std::snprintf(line, sizeof line, "  %-22s %8.3f ms  %4.1f %%  %5lld calls\n", name.c_str(),
                  work.seconds * 1e3, 100 * work.seconds / b.profiled,
                  static_cast<long long>(work.calls));
    text += line;
  }
  std::snprintf(line, sizeof line, "  %-22s %8.3f ms  %4.1f %%\n", "between them",
                (b.profiled - known) * 1e3, 100 * (b.profiled - known) / b.profiled);
  return text + line;
}

void write_zipf_tokens(FileSystem& files, const std::string& path, int64_t vocabulary,
                       int64_t tokens) {
  const Random random(11, "zipf");
  TokenWriter writer(files, path, TokenFormat::megatron, vocabulary);
  std::vector<int32_t> ids(4096);
  const double log_size = std::log(double(vocabulary));
  uint64_t next = 0;
  for (int64_t done = 0; done < tokens; done += int64_t(ids.size())) {
    for (int32_t& id : ids)  // density 1 / (id + 1): exp of a uniform number
      id = int32_t(
          std::min(double(vocabulary - 1), std::exp(log_size * random.uniform(next++)) - 1));
    writer.add_document(ids);
  }
  writer.commit();
}

}  // namespace moemamba
