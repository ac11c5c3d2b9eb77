#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <thread>
#include <vector>

#include "core/schema.h"
#include "launcher/run_config.pb.h"
#include "model/language_model.h"
#include "runtime/checkpoint_reader.h"
#include "runtime/checkpoints.h"
#include "tests/bench/bench.h"
#include "tests/support/in_world.h"

// Saving and loading the quickstart's whole state. The ceiling of a save is the slower of hashing
// the same bytes on all cores and writing them to the same disk one after the other past the page
// cache, of loading the slower of hashing and reading; all measured in turn in the same run.
namespace moemamba {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kVocabulary = 4096;
constexpr size_t kBlock = 1 << 20;

template <class Work>
double seconds_of(Work&& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

ModelSizes quickstart_sizes() {
  RunConfig config;
  Settings settings(config);
  settings.read_file(MOEMAMBA_SOURCE_DIR "/configs/quickstart.textproto");
  settings.throw_problems();
  return model_sizes(config.model(), kVocabulary);
}

// Memory that O_DIRECT takes.
struct Block {
  Block() : data(static_cast<char*>(std::aligned_alloc(4096, kBlock))) {
    for (size_t i = 0; i < kBlock; ++i) data[i] = char(i * 2654435761u >> 13);
  }
  ~Block() { std::free(data); }
  char* data;
};

double hash_seconds(int64_t bytes) {
  const int cores = std::max(1, int(std::thread::hardware_concurrency()));
  const Block block;
  return seconds_of([&] {
    in_threads(cores, [&](int core) {
      Sha256 digest;
      const int64_t own = bytes * (core + 1) / cores - bytes * core / cores;
      for (int64_t at = 0; at < own; at += int64_t(kBlock))
        digest.add(block.data, size_t(std::min(int64_t(kBlock), own - at)));
      benchmark::DoNotOptimize(digest.hex());
    });
  });
}

// Of one file of whole blocks, past the page cache where the system lets us.
double write_seconds(const std::string& path, int64_t bytes) {
  const Block block;
  int flags = O_WRONLY | O_CREAT | O_TRUNC | O_DIRECT;
  int file = ::open(path.c_str(), flags, 0666);
  if (file < 0) file = ::open(path.c_str(), flags & ~O_DIRECT, 0666);
  check(file >= 0, path, ": cannot be written");
  const double seconds = seconds_of([&] {
    for (int64_t at = 0; at < bytes; at += int64_t(kBlock))
      check(::write(file, block.data, kBlock) == ssize_t(kBlock), path, ": short write");
    check(::fsync(file) == 0, path, ": fsync failed");
  });
  ::close(file);
  return seconds;
}

double read_seconds(const std::string& path) {
  const Block block;
  int file = ::open(path.c_str(), O_RDONLY | O_DIRECT);
  if (file < 0) file = ::open(path.c_str(), O_RDONLY);
  check(file >= 0, path, ": cannot be read");
  const double seconds = seconds_of([&] {
    while (::read(file, block.data, kBlock) > 0) {
    }
  });
  ::close(file);
  return seconds;
}

// Out of the page cache, so that loading reads the disk.
void forget(const std::string& folder) {
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    const int file = ::open(entry.path().c_str(), O_RDONLY);
    if (file < 0) continue;
    ::posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);
    ::close(file);
  }
}

struct Figures {
  double bytes = 0, save = 0, load = 0, hash = 0, write = 0, read = 0;
  double save_ratio = 0, load_ratio = 0;  // to the ceilings of the same moment
  double first_block = 0, block = 0;      // of an asynchronous save: the first, a later one
};

// One rank's model with its moments, without the rest of a session.
struct State {
  State(ProcessGroups& groups, const ModelSizes& sizes)
      : store(groups), model(sizes, store, groups.layout, groups.rank) {
    store.allocate();
    store.initialise(42);
  }
  ParameterStore store;
  LanguageModel model;
};

// On every rank; rank 0 has the figures.
void measure_rank(ProcessGroups& groups, const ModelSizes& sizes, const std::string& run,
                  Figures& figures) {
  PosixFileSystem files;
  Stream stream = Stream::immediate();
  State state(groups, sizes);
  const auto timed = [&](double& seconds, auto&& work) {
    barrier(*groups.control, stream);
    const double own = seconds_of([&] {
      work();
      barrier(*groups.control, stream);
    });
    if (groups.rank == 0) seconds = own;
  };
  CheckpointFacts facts{.step = 1, .chain = std::string(64, '0'), .run_id = "bench"};
  CheckpointWriter writer(files, groups, state.store, {.run = run, .may_write = {}});
  timed(figures.save, [&] {
    const std::string problem = writer.write(facts);
    check(problem.empty(), problem);
  });
  if (groups.rank == 0) forget(run);
  timed(figures.load,
        [&] { load_newest(files, groups, stream, state.store, {.run = run, .say = {}}); });
  Checkpoints checkpoints(files, groups, state.store,
                          {.writer = {.run = run, .may_write = {}}, .say = {}});
  for (double* blocked : {&figures.first_block, &figures.block}) {
    barrier(*groups.control, stream);
    ++facts.step;
    checkpoints.save(facts);
    if (groups.rank == 0) *blocked = checkpoints.blocked_seconds();
    checkpoints.finish();
  }
}

Figures measure(int ranks, const ModelSizes& sizes) {
  Figures figures;
  const std::string run = concat("checkpoint-bench-", getpid());
  fs::remove_all(run);
  in_world(RankLayout(ranks, ranks, int(sizes.E)),
           [&](ProcessGroups& groups) { measure_rank(groups, sizes, run, figures); });
  const Checkpoint checkpoint(list_checkpoints(run).front().path);
  for (const auto& file : checkpoint.manifest().files()) figures.bytes += double(file.bytes());
  figures.hash = hash_seconds(int64_t(figures.bytes));
  figures.write = write_seconds(join_path(run, "plain"), int64_t(figures.bytes));
  figures.read = read_seconds(join_path(run, "plain"));
  fs::remove_all(run);
  return figures;
}

// One figure of all repetitions: the median, for anything may have disturbed one of them.
double median(const std::vector<Figures>& all, double Figures::*figure) {
  std::vector<double> sorted;
  for (const Figures& one : all) sorted.push_back(one.*figure);
  std::sort(sorted.begin(), sorted.end());
  return sorted[sorted.size() / 2];
}

void run(benchmark::State& state, const ModelSizes& sizes) {
  std::vector<Figures> all;
  for (auto _ : state) {
    all.push_back(measure(int(state.range(0)), sizes));
    Figures& f = all.back();
    f.save_ratio = f.save / std::max(f.hash, f.write);
    f.load_ratio = f.load / std::max(f.hash, f.read);
    state.SetIterationTime(f.save);
  }
  const auto ms = [&](double Figures::*figure) { return median(all, figure) * 1e3; };
  state.counters["MiB"] = median(all, &Figures::bytes) / (1 << 20);
  state.counters["hash_ms"] = ms(&Figures::hash);
  state.counters["write_ms"] = ms(&Figures::write);
  state.counters["read_ms"] = ms(&Figures::read);
  state.counters["save_ms"] = ms(&Figures::save);
  state.counters["load_ms"] = ms(&Figures::load);
  state.counters["save_over_ceiling"] = median(all, &Figures::save_ratio);
  state.counters["load_over_ceiling"] = median(all, &Figures::load_ratio);
  state.counters["blocked_first_ms"] = ms(&Figures::first_block);
  state.counters["blocked_ms"] = ms(&Figures::block);
}

}  // namespace

void add_checkpoint_benchmarks() {
  static const ModelSizes sizes = quickstart_sizes();
  benchmark::RegisterBenchmark("Checkpoint", [](benchmark::State& state) { run(state, sizes); })
      ->ArgName("ranks")
      ->Arg(1)
      ->Arg(2)
      ->Iterations(9)
      ->UseManualTime()
      ->Unit(benchmark::kMillisecond);
}

}  // namespace moemamba
