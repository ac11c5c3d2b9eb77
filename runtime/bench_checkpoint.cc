#include "runtime/bench_checkpoint.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <filesystem>
#include <thread>

#include "model/language_model.h"
#include "runtime/bench_tools.h"
#include "runtime/checkpoint_reader.h"
#include "runtime/checkpoints.h"

namespace moemamba {

namespace {

namespace fs = std::filesystem;
using Round = CheckpointBench::Round;

constexpr int64_t kBlock = 1 << 20;

template <class Work>
double seconds_of(Work&& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double processor_seconds() {
  timespec now{};
  ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return double(now.tv_sec) + double(now.tv_nsec) * 1e-9;
}

// Memory that O_DIRECT takes, for files that are read or written in such blocks. Of ordinary pages,
// as that of dd(1): huge ones, which an allocator may happen to give, halve the time of reading.
class Block {
 public:
  Block()
      : data_(::mmap(nullptr, kBlock, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
    check(data_ != MAP_FAILED, "out of memory: could not allocate ", kBlock, " bytes");
    ::madvise(data_, kBlock, MADV_NOHUGEPAGE);
    for (int64_t i = 0; i < kBlock; ++i) data()[i] = std::byte(uint64_t(i) * 2654435761u >> 13);
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block() { ::munmap(data_, kBlock); }
  std::byte* data() const { return static_cast<std::byte*>(data_); }

 private:
  void* data_;
};

double hash_seconds(int64_t bytes) {
  const int cores = std::max(1, int(std::thread::hardware_concurrency()));
  Stream stream = Stream::immediate(cores);
  const Block block;
  return seconds_of([&] {
    stream.parallel_for(cores, [&](int64_t core) {
      Sha256 digest;
      const int64_t own = bytes * (core + 1) / cores - bytes * core / cores;
      for (int64_t at = 0; at < own; at += kBlock)
        digest.add(block.data(), size_t(std::min(kBlock, own - at)));
      digest.hex();
    });
  });
}

// Of one file of whole blocks, past the page cache where the system lets us.
double write_seconds(FileSystem& files, const std::string& path, int64_t bytes) {
  const Block block;
  const auto file = files.open(path, OpenMode::create_direct);
  return seconds_of([&] {
    for (int64_t at = 0; at < bytes; at += kBlock) file->write(block.data(), size_t(kBlock));
    file->sync();
    file->close();
  });
}

double read_seconds(const std::string& path) {
  const Block block;
  int file = ::open(path.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC);
  if (file < 0) file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  check(file >= 0, path, ": cannot be read");
  const double seconds = seconds_of([&] {
    while (::read(file, block.data(), size_t(kBlock)) > 0) {
    }
  });
  ::close(file);
  return seconds;
}

// Out of the page cache, so that loading reads the disk.
void forget(const std::string& folder) {
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    const int file = ::open(entry.path().c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) continue;
    ::posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);
    ::close(file);
  }
}

// One rank's part of the measurement: its model with its moments, without the rest of a session.
class CheckpointCase {
 public:
  CheckpointCase(FileSystem& files, ProcessGroups& groups, const ModelSizes& sizes,
                 const std::string& folder)
      : files_(files),
        groups_(groups),
        folder_(folder),
        compute_(groups.device == DeviceKind::cuda ? Stream::cuda() : Stream::immediate()),
        store_(groups),
        model_(sizes, store_, groups.layout, groups.rank) {
    store_.allocate();
    store_.initialise(42);
    writer_.emplace(files, groups, store_,
                    CheckpointWriter::Options{.run = folder, .may_write = {}});
    Checkpoints::Options options{.writer = {.run = folder, .may_write = {}}, .say = {}};
    behind_.emplace(files, groups, store_, options);
  }
  void round(Round& round);
  int64_t bytes() const { return bytes_; }

 private:
  void meet() { barrier(*groups_.control, host_); }
  template <class Work>
  double together(Work&& work) {
    meet();
    return seconds_of([&] {
      work();
      meet();
    });
  }
  void save_behind(Round& round);
  void ceilings(Round& round);

  FileSystem& files_;
  ProcessGroups& groups_;
  const std::string folder_;
  Stream host_ = Stream::immediate(), compute_;
  ParameterStore store_;
  LanguageModel model_;
  std::optional<CheckpointWriter> writer_;
  std::optional<Checkpoints> behind_;
  CheckpointFacts facts_{.step = 0, .chain = std::string(64, '0'), .run_id = "bench"};
  int64_t bytes_ = 0;
};

void CheckpointCase::save_behind(Round& round) {
  ++facts_.step;
  meet();
  round.behind = seconds_of([&] {
    round.staged = seconds_of([&] {
      const Event staged = behind_->save(facts_, &compute_);
      round.held_up = behind_->blocked_seconds();
      Stream::wait_on_host(staged);
    });
    behind_->finish();
  });
  check(behind_->failed() == 0, folder_, ": a save behind the steps failed");
}

void CheckpointCase::ceilings(Round& round) {
  const std::string plain = join_path(folder_, "plain");
  round.hash = hash_seconds(bytes_);
  round.write = write_seconds(files_, plain, bytes_);
  round.read = read_seconds(plain);
}

void CheckpointCase::round(Round& round) {
  ++facts_.step;
  const double before = processor_seconds();
  round.save = together([&] {
    writer_->stage(&compute_);
    const std::string problem = writer_->write(facts_);
    check(problem.empty(), problem);
  });
  round.save_processors = processor_seconds() - before;
  const bool first = groups_.rank == 0;
  if (first) {
    const Checkpoint checkpoint(list_checkpoints(folder_).front().path);
    bytes_ = 0;
    for (const auto& file : checkpoint.manifest().files()) bytes_ += file.bytes();
    forget(folder_);
  }
  round.load =
      together([&] { load_newest(files_, groups_, host_, store_, {.run = folder_, .say = {}}); });
  save_behind(round);
  meet();
  if (first) ceilings(round);
  if (first) remove_tree(files_, folder_);
  meet();
}

// Whatever ends the measurement: nothing of it stays.
struct RemovedAtEnd {
  FileSystem& files;
  std::string folder;
  bool mine;
  ~RemovedAtEnd() {
    try {
      if (mine) remove_tree(files, folder);
    } catch (const std::exception&) {
      // The measurement itself has met that disk, too, or the figures are worth more.
    }
  }
};

double median_of(const std::vector<Round>& rounds, FunctionRef<double(const Round&)> figure) {
  std::vector<double> values;
  for (const Round& round : rounds) values.push_back(figure(round));
  return median(values);
}

}  // namespace

double CheckpointBench::median(double Round::*figure) const {
  return median_of(rounds, [&](const Round& round) { return round.*figure; });
}
double CheckpointBench::save_ratio() const {
  return median_of(rounds, [](const Round& round) { return round.save / round.save_ceiling(); });
}
double CheckpointBench::load_ratio() const {
  return median_of(rounds, [](const Round& round) { return round.load / round.load_ceiling(); });
}

CheckpointBench bench_checkpoint(FileSystem& files, ProcessGroups& groups, const ModelSizes& sizes,
                                 const CheckpointBenchOptions& options) {
  const RemovedAtEnd removed{files, options.folder, groups.rank == 0};
  if (groups.rank == 0) remove_tree(files, options.folder);
  CheckpointCase one(files, groups, sizes, options.folder);
  CheckpointBench bench{.bytes = 0, .ranks = groups.layout.ranks(), .rounds = {}};
  for (int64_t i = 0; i < options.repeat; ++i) {
    if (groups.rank == 0) files.make_folders(options.folder);
    one.round(bench.rounds.emplace_back());
  }
  bench.bytes = one.bytes();
  return bench;
}

std::string checkpoint_bench_text(const CheckpointBench& b) {
  char line[200];
  std::snprintf(line, sizeof line,
                "checkpoint %.1f MiB from %d rank%s; medians of %zu\n"
                "%-28s %10s %8s  %s\n",
                double(b.bytes) / (1 << 20), b.ranks, b.ranks == 1 ? "" : "s", b.rounds.size(), "",
                "ms", "GB/s", "of its ceiling");
  std::string text = line;
  const auto add = [&](const char* what, double Round::*figure, const std::string& beside) {
    const double seconds = b.median(figure);
    std::snprintf(line, sizeof line, "%-28s %10.2f %8.2f  %s\n", what, seconds * 1e3,
                  double(b.bytes) / seconds * 1e-9, beside.c_str());
    text += line;
  };
  const auto times = [&](double ratio, const char* ceiling) {
    std::snprintf(line, sizeof line, "%.2f times %s", ratio, ceiling);
    return std::string(line);
  };
  add("SHA-256 on all cores", &Round::hash, "");
  add("plain write and sync", &Round::write, "");
  add("plain read", &Round::read, "");
  add("save", &Round::save, times(b.save_ratio(), "the slower of SHA-256 and write"));
  add("  of this process's cores", &Round::save_processors, "");
  add("load", &Round::load, times(b.load_ratio(), "the slower of SHA-256 and read"));
  add("save behind the steps", &Round::behind, "read again from the disk, too");
  std::snprintf(line, sizeof line, "%-28s %10.2f (the first time %.2f)\n%-28s %10.2f\n",
                "  holds up training for", b.median(&Round::held_up) * 1e3,
                b.rounds.front().held_up * 1e3, "  and the optimizer for",
                b.median(&Round::staged) * 1e3);
  return text + line;
}

}  // namespace moemamba
