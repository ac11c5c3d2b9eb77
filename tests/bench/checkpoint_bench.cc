#include <unistd.h>

#include "core/schema.h"
#include "launcher/run_config.pb.h"
#include "runtime/bench_checkpoint.h"
#include "tests/bench/bench.h"
#include "tests/support/in_world.h"

// Saving and loading the quickstart's whole state by ranks that are threads, beside the ceilings of
// runtime/bench_checkpoint.h. `moemamba bench checkpoint` does the same with processes.
namespace moemamba {
namespace {

constexpr int64_t kVocabulary = 4096, kRounds = 9;

ModelSizes quickstart_sizes() {
  RunConfig config;
  Settings settings(config);
  settings.read_file(MOEMAMBA_SOURCE_DIR "/configs/quickstart.textproto");
  settings.throw_problems();
  return model_sizes(config.model(), kVocabulary);
}

CheckpointBench measure(int ranks, const ModelSizes& sizes) {
  const std::string folder = concat("checkpoint-bench-", getpid());
  PosixFileSystem files;
  CheckpointBench result;
  in_world(RankLayout(ranks, ranks, int(sizes.E)), [&](ProcessGroups& groups) {
    CheckpointBench own =
        bench_checkpoint(files, groups, sizes, {.folder = folder, .repeat = kRounds});
    if (groups.rank == 0) result = std::move(own);
  });
  return result;
}

void run(benchmark::State& state, const ModelSizes& sizes) {
  CheckpointBench bench;
  using Round = CheckpointBench::Round;
  for (auto _ : state) {
    bench = measure(int(state.range(0)), sizes);
    state.SetIterationTime(bench.median(&Round::save));
  }
  const auto ms = [&](double Round::*figure) { return bench.median(figure) * 1e3; };
  state.counters["MiB"] = double(bench.bytes) / (1 << 20);
  state.counters["hash_ms"] = ms(&Round::hash);
  state.counters["write_ms"] = ms(&Round::write);
  state.counters["read_ms"] = ms(&Round::read);
  state.counters["save_ms"] = ms(&Round::save);
  state.counters["save_cpu_ms"] = ms(&Round::save_processors);
  state.counters["load_ms"] = ms(&Round::load);
  state.counters["save_over_ceiling"] = bench.save_ratio();
  state.counters["load_over_ceiling"] = bench.load_ratio();
  state.counters["blocked_first_ms"] = bench.rounds.front().held_up * 1e3;
  state.counters["blocked_ms"] = ms(&Round::held_up);
}

}  // namespace

void add_checkpoint_benchmarks() {
  static const ModelSizes sizes = quickstart_sizes();
  benchmark::RegisterBenchmark("Checkpoint", [](benchmark::State& state) { run(state, sizes); })
      ->ArgName("ranks")
      ->Arg(1)
      ->Arg(2)
      ->Iterations(1)
      ->UseManualTime()
      ->Unit(benchmark::kMillisecond);
}

}  // namespace moemamba
