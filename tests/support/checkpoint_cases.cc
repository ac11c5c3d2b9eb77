#include "tests/support/checkpoint_cases.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <map>
#include <mutex>

#include "parallel/gather_blobs.h"
#include "runtime/lease.h"
#include "runtime/run_folder.h"
#include "runtime/safetensors.h"
#include "runtime/state_hash.h"
#include "tests/support/in_world.h"
#include "tests/support/training.h"

namespace moemamba {

namespace {

namespace fs = std::filesystem;

ModelSizes sizes_of(StateSize size) {
  return trainer_options({.experts = kStateExperts,
                          .blocks = 1,
                          .width = 4,
                          .hidden = 3,
                          .vocabulary = size == StateSize::large ? 5000 : 7,
                          .length = 4,
                          .model = "state: 2"})
      .sizes;
}

uint64_t scrambled(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

void fill_piece(const StatePiece& piece, uint64_t seed) {
  uint64_t key = scrambled(seed * 3 + uint64_t(piece.kind) + 1);
  for (char c : piece.tensor) key = scrambled(key ^ uint8_t(c));
  for (int64_t i = piece.begin; i < piece.end; ++i)
    piece.data[i - piece.begin] = float(scrambled(key + uint64_t(i)) >> 40) / float(1 << 24);
}

}  // namespace

StateHolder::StateHolder(ProcessGroups& groups, StateSize size)
    : store(groups), model(sizes_of(size), store, groups.layout, groups.rank) {
  store.allocate();
}

void StateHolder::fill(uint64_t seed) {
  for (const StatePiece& piece : held_values(store)) fill_piece(piece, seed);
  for (const StatePiece& piece : owned_moments(store)) fill_piece(piece, seed);
}

uint64_t hash_of_seed(uint64_t seed, StateSize size) {
  static std::mutex mutex;
  static std::map<std::pair<uint64_t, StateSize>, uint64_t> known;
  std::lock_guard lock(mutex);
  if (auto at = known.find({seed, size}); at != known.end()) return at->second;
  uint64_t hash = 0;
  in_world(RankLayout(1, 1, kStateExperts), [&](ProcessGroups& groups) {
    StateHolder holder(groups, size);
    holder.fill(seed);
    Stream stream = Stream::immediate();
    hash = state_hash(groups, stream, holder.store);
  });
  return known[{seed, size}] = hash;
}

CheckpointFacts facts_of(int64_t step) {
  CheckpointFacts facts;
  facts.step = step;
  facts.next_sample = step * 4;
  facts.loss = 1.0 / double(step);
  facts.chain = std::string(64, 'a');
  facts.run_id = "crash";
  facts.config = "train { steps: 9 }";
  facts.tokenizer = "bytes";
  facts.build = "test";
  return facts;
}

FileSystem& plain_disk() {
  static PosixFileSystem files;
  return files;
}

std::vector<std::string> save(const SaveCase& c) {
  std::vector<std::string> verdicts(size_t(c.ranks), "nothing");
  in_world(
      RankLayout(c.ranks, c.expert, kStateExperts),
      [&](ProcessGroups& groups) {
        StateHolder holder(groups, c.size);
        holder.fill(uint64_t(c.step));
        FileSystem& files = c.disks ? c.disks(groups.rank) : plain_disk();
        CheckpointWriter writer(files, groups, holder.store,
                                {.run = c.run,
                                 .generation = c.generation,
                                 .may_write = c.may_write,
                                 .block_bytes = c.block_bytes});
        writer.stage();
        std::string& verdict = verdicts[size_t(groups.rank)];
        const auto start = std::chrono::steady_clock::now();
        const auto note = [&] {
          if (c.seconds)
            (*c.seconds)[size_t(groups.rank)] =
                std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        };
        try {
          verdict = writer.write(facts_of(c.step));
          note();
        } catch (const PeerLost& lost) {
          note();
          verdict = std::string("lost: ") + lost.what();
          groups.abort(lost.what());
        }
      },
      c.deadline);
  return verdicts;
}

int64_t loaded_step(const std::string& run, int64_t generation, std::string* why, StateSize size) {
  int64_t step = 0;
  in_world(RankLayout(1, 1, kStateExperts), [&](ProcessGroups& groups) {
    StateHolder holder(groups, size);
    Stream stream = Stream::immediate();
    fence_attempts(plain_disk(), run, generation);  // as the lease does before
    try {
      const auto found = load_newest(plain_disk(), groups, stream, holder.store,
                                     {.run = run, .generation = generation, .say = {}});
      if (!found) return;
      step = found->step();
      EXPECT_EQ(state_hash(groups, stream, holder.store), hash_of_seed(uint64_t(step), size))
          << run << ": a mix was loaded as step " << step;
    } catch (const Error& error) {
      if (why) *why = error.what();
      step = -1;
    }
  });
  return step;
}

int64_t shards_on_borders(const std::string& run) {
  int64_t count = 0;
  for (const auto& entry : fs::directory_iterator(list_checkpoints(run).front().path)) {
    if (entry.path().extension() != ".safetensors") continue;
    const SafetensorsReader shard(entry.path().string());
    const int64_t values = shard.tensors().back().end, header = int64_t(entry.file_size()) - values;
    count += header % int64_t(kDirectBlock) == 0 && values >= int64_t(kDirectBlock);
  }
  return count;
}

LaunchResult launch(const LaunchCase& c) {
  LaunchResult result;
  const auto disk = [&](int rank) -> FileSystem& { return c.disks ? c.disks(rank) : plain_disk(); };
  std::unique_ptr<Lease> lease;
  in_world(RankLayout(c.ranks, c.expert, kStateExperts), [&](ProcessGroups& groups) {
    FileSystem& files = disk(groups.rank);
    StateHolder holder(groups);
    Stream stream = Stream::immediate();
    std::string facts;
    if (groups.rank == 0) {
      lease = std::make_unique<Lease>(files, c.run, Lease::Options{});
      const bool resumes = holds_run(c.run) && !c.overwrite;
      if (!resumes) claim_run_folder(files, c.run, "train { steps: 9 }\n", c.overwrite);
      facts = (resumes ? "r" : "n") + std::to_string(lease->generation());
    }
    facts = broadcast_blob(*groups.control, stream, facts);
    const int64_t generation = std::stoll(facts.substr(1));
    int64_t loaded = 0;
    if (facts[0] == 'r') {
      const auto found = load_newest(files, groups, stream, holder.store,
                                     {.run = c.run, .generation = generation, .say = {}});
      if (found) {
        loaded = found->step();
        EXPECT_EQ(state_hash(groups, stream, holder.store), hash_of_seed(uint64_t(loaded)))
            << c.run << ": a mix was loaded as step " << loaded;
      }
    }
    Checkpoints::Options options{.writer = {.run = c.run,
                                            .generation = generation,
                                            .may_write = {},
                                            .block_bytes = kDirectBlock},
                                 .asynchronous = false,
                                 .retention = c.retention,
                                 .max_failed = 100,
                                 .say = {}};
    options.retention.always = loaded > 0 ? loaded : -1;
    if (groups.rank == 0) {
      result.loaded = loaded;
      options.writer.may_write = [&] { return lease->ours(); };
      options.say = [&](const std::string& text) {
        if (text.rfind("saved", 0) != 0) result.problem += text;
      };
    }
    holder.fill(uint64_t(loaded + 1));
    Checkpoints checkpoints(files, groups, holder.store, options);
    checkpoints.save(facts_of(loaded + 1));
  });
  return result;
}

MemoryFolder::MemoryFolder(const std::string& name) {
  const fs::path root =
      ::access("/dev/shm", W_OK) == 0 ? fs::path("/dev/shm") : fs::temp_directory_path();
  path_ = (root / ("moemamba-" + name + "-" + std::to_string(getpid()))).string();
  fs::remove_all(path_);
  fs::create_directories(path_);
}

MemoryFolder::~MemoryFolder() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
}

void flip_bit(const std::string& path, int64_t bit) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekg(bit / 8);
  const int byte = file.get();
  file.seekp(bit / 8);
  file.put(char(byte ^ (1 << (bit % 8))));
  ASSERT_TRUE(file.good()) << path;
}

}  // namespace moemamba
