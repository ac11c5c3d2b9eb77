// P2 durable: a real ext4 loses power at any moment; what was announced as committed is there.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <mutex>
#include <random>
#include <thread>

#include "tests/support/checkpoint_cases.h"
#include "tests/support/in_world.h"
#include "tests/support/seam_files.h"
#include "tests/support/soak.h"

namespace moemamba {
namespace {

namespace fs = std::filesystem;

bool quietly(const std::string& command) {
  return std::system((command + " >/dev/null 2>&1").c_str()) == 0;
}

// An image with ext4 on it, mounted.
class Ext4 {
 public:
  Ext4(const std::string& image, const std::string& folder) : folder_(folder) {
    fs::create_directories(folder);
    mounted_ = quietly("mount -o loop " + image + " " + folder);
  }
  ~Ext4() {
    if (mounted_ && !quietly("umount " + folder_)) quietly("umount -l " + folder_);
  }
  bool mounted() const { return mounted_; }

 private:
  std::string folder_;
  bool mounted_;
};

struct Board {
  std::atomic<int64_t> committed;  // the last step that write() called saved
  std::atomic<bool> stop;
};

using Dropped = std::function<bool(const FileCall&)>;

struct Writer {
  uint64_t seed;
  Dropped dropped = {};
  StateSize size = StateSize::tiny;
};

// Saves one step after another, with pauses anywhere, until told to stop.
void keep_saving(const std::string& run, Board& board, const Writer& writer) {
  std::mt19937_64 random(writer.seed);
  SeamFiles files;
  std::mutex mutex;
  files.before = [&](FileCall& call) {
    uint64_t pause = 0;
    {
      std::lock_guard lock(mutex);
      pause = random() % 10 == 0 ? random() % 4000 : 0;
    }
    std::this_thread::sleep_for(std::chrono::microseconds(pause));
    return !writer.dropped || !writer.dropped(call);
  };
  for (int64_t step = board.committed + 1; !board.stop; ++step) {
    const std::string verdict =
        save({.run = run,
              .step = step,
              .disks = [&](int) -> FileSystem& { return files; },
              .block_bytes = writer.size == StateSize::large ? 8 * kDirectBlock : kDirectBlock,
              .size = writer.size})[0];
    if (!verdict.empty()) {
      std::fprintf(stderr, "%s\n", verdict.c_str());
      _exit(2);
    }
    board.committed = step;
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 8000));
    if (random() % 2 == 0) continue;
    write_file(files, checkpoints_folder(run) + "/LATEST", checkpoint_name(step) + "\n");
    collect_garbage(files, run, 1, {.keep_last = 2});
  }
  _exit(0);
}

struct Campaign {
  int64_t images = 0, unstable = 0, lost = 0, steps = 0;
  std::string first;  // what was lost
};

// A copy of a disk takes a few ms, a power cut none: only a copy during which nothing was written
// is one that a cut could leave.
bool copy_at_once(const std::string& image, const std::string& copy) {
  for (int tries = 0; tries < 20; ++tries) {
    fs::copy_file(image, copy, fs::copy_options::overwrite_existing);
    if (read_file(image) == read_file(copy)) return true;
  }
  return false;
}

void cut_power(MemoryFolder& folder, Board& board, pid_t writer, bool stopped, StateSize size,
               Campaign& campaign) {
  if (stopped) {
    kill(writer, SIGSTOP);
    int status = 0;
    waitpid(writer, &status, WUNTRACED);
    ASSERT_TRUE(WIFSTOPPED(status)) << "the writer has ended";
  }
  const int64_t committed = board.committed;
  // A name of its own: a program that has left for a mount namespace of its own meanwhile still has
  // the last copy mounted, and mount would give us that one again if this were the same file.
  const std::string image = folder / concat("copy", campaign.images + campaign.unstable);
  const bool stable = copy_at_once(folder / "image", image);
  if (stopped) kill(writer, SIGCONT);
  if (!stable) fs::remove(image);
  ++(stable ? campaign.images : campaign.unstable);
  if (!stable) return;
  std::string why;
  int64_t found = -1;
  {
    Ext4 copy(image, folder / "copied");
    EXPECT_TRUE(copy.mounted());
    if (copy.mounted()) found = loaded_step(folder / "copied/run", 99, &why, size);
    if (found > 0 && size == StateSize::large) {
      EXPECT_EQ(shards_on_borders(folder / "copied/run"), 6);
    }
  }
  fs::remove(image);
  if (found >= committed) return;
  ++campaign.lost;
  if (campaign.first.empty())
    campaign.first = concat("step ", committed, " was committed, found ", found, " ", why);
}

Campaign run_campaign(int64_t images, const Writer& saves, bool until_lost) {
  Campaign campaign;
  MemoryFolder folder("crash-power");
  std::mt19937_64 random(test_seed());
  auto* board =
      new (mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0))
          Board{};
  const std::string bytes = saves.size == StateSize::large ? "16M " : "8M ";
  EXPECT_TRUE(quietly("truncate -s " + bytes + (folder / "image") + " && mkfs.ext4 -q -F " +
                      (folder / "image")));
  {
    const Ext4 disk(folder / "image", folder / "disk");
    EXPECT_TRUE(disk.mounted());
    fs::create_directories(folder / "disk/run");
    sync();
    std::fflush(nullptr);
    const pid_t writer = fork();
    if (writer == 0) keep_saving(folder / "disk/run", *board, saves);
    const auto start = std::chrono::steady_clock::now();
    const auto more = [&](int64_t i) {  // 5,000 as far as there is time for them
      const bool soaks = !until_lost && campaign.images < 5000 &&
                         std::chrono::steady_clock::now() - start <
                             std::chrono::seconds(soak_seconds() / 2);  // of two
      return ((campaign.images < images && i < 4 * images) || soaks) &&
             !(until_lost && campaign.lost) && !testing::Test::HasFailure();
    };
    for (int64_t i = 0; more(i); ++i) {
      std::this_thread::sleep_for(std::chrono::microseconds(random() % 12000));
      // As a user would: never a first image without any checkpoint.
      while (board->committed == 0) std::this_thread::yield();
      cut_power(folder, *board, writer, i % 4 != 0, saves.size, campaign);
    }
    board->stop = true;
    int status = 0;
    waitpid(writer, &status, 0);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "the writer failed";
  }
  campaign.steps = board->committed;
  munmap(board, sizeof *board);
  return campaign;
}

// Why not here; "" if it can.
std::string obstacle() {
  if (geteuid() != 0) return "only root may mount";
  MemoryFolder folder("crash-power");
  if (!quietly("truncate -s 8M " + (folder / "image") + " && mkfs.ext4 -q -F " +
               (folder / "image")))
    return "no mkfs.ext4";
  return Ext4(folder / "image", folder / "disk").mounted() ? "" : "no loop device";
}

TEST(PowerCutOfADisk, LosesNothingThatWasCommitted) {
  if (const std::string why = obstacle(); !why.empty()) GTEST_SKIP() << why;
  for (StateSize size : {StateSize::tiny, StateSize::large}) {
    const bool large = size == StateSize::large;  // past the page cache
    const Campaign campaign =
        run_campaign(large ? 25 : 50, {.seed = test_seed(), .size = size}, false);
    EXPECT_EQ(campaign.lost, 0) << campaign.first;
    EXPECT_GE(campaign.images, large ? 15 : 30);
    std::printf(
        "P2: %lld images of an ext4 (%lld more changed meanwhile) of %lld %ssaves, seed %llu\n",
        static_cast<long long>(campaign.images), static_cast<long long>(campaign.unstable),
        static_cast<long long>(campaign.steps), large ? "direct " : "",
        static_cast<unsigned long long>(test_seed()));
  }
}

// The test of the test: a writer that leaves out a sync loses what it has announced. (Of the
// attempt's own folder ext4 needs none; PowerCut of crash_order_test.cc does.)
TEST(PowerCutOfADisk, IsFatalWithoutAnyOneSync) {
  if (const std::string why = obstacle(); !why.empty()) GTEST_SKIP() << why;
  const auto file = [](const char* part) {
    return [part](const FileCall& call) {
      return call.what == Call::sync && call.path.find(part) != std::string::npos;
    };
  };
  const std::pair<const char*, Dropped> mutations[] = {
      {"weights' shard", file("/model-")},
      {"optimizer's shard", file("/optimizer-")},
      {"manifest", file("MANIFEST.pb")},
      {"checkpoints' folder",
       [](const FileCall& call) {
         return call.what == Call::sync_folder && call.path.ends_with("/checkpoints");
       }},
  };
  for (const auto& [name, dropped] : mutations) {
    const Campaign campaign = run_campaign(200, {.seed = test_seed(), .dropped = dropped}, true);
    EXPECT_GT(campaign.lost, 0) << "not noticed: no sync of the " << name;
    std::printf("  without the sync of the %-20s lost at image %3lld: %s\n", name,
                static_cast<long long>(campaign.images),
                campaign.first.substr(0, campaign.first.find(" /")).c_str());
  }
}

// Flips a bit of what a file holds on the disk itself, behind the back of the file system, which
// still has the right bytes in memory. False: its last bytes were not found on the disk.
bool damage_on_disk(const std::string& image, const std::string& file) {
  const std::string content = read_file(file), mark = content.substr(content.size() - 64);
  const size_t at = read_file(image).find(mark);
  if (at == std::string::npos) return false;
  flip_bit(image, int64_t(at) * 8 + 5);
  return read_file(file) == content;
}

// What is read again after a save is the disk's, not the memory's in which it was written.
TEST(ADiskThatForgets, IsFoundOutBehindThePageCache) {
  if (const std::string why = obstacle(); !why.empty()) GTEST_SKIP() << why;
  for (const char* name : {"model-00001-of-00002.safetensors",
                           "optimizer-exp_avg-00002-of-00002.safetensors", kManifestName}) {
    MemoryFolder folder("crash-power");
    const std::string image = folder / "image", run = folder / "disk/run";
    ASSERT_TRUE(quietly("truncate -s 8M " + image + " && mkfs.ext4 -q -F " + image));
    const Ext4 disk(image, folder / "disk");
    bool damaged = false;
    std::vector<std::string> said;
    in_world(RankLayout(2, 2, kStateExperts), [&](ProcessGroups& groups) {
      StateHolder holder(groups);
      SeamFiles files;
      files.after = [&](const FileCall& call) {
        const std::string place = call.path + "/step-00000002";
        if (call.what == Call::sync_folder && file_exists(place) && !damaged)
          damaged = damage_on_disk(image, join_path(place, name));
      };
      Checkpoints checkpoints(files, groups, holder.store,
                              {.writer = {.run = run, .generation = 1, .may_write = {}},
                               .retention = {.keep_last = 1},
                               .say = [&](const std::string& text) { said.push_back(text); }});
      for (int64_t step : {1, 2}) {
        holder.fill(uint64_t(step));
        checkpoints.save(facts_of(step));
      }
      checkpoints.finish();
    });
    EXPECT_TRUE(damaged) << "the disk does not have what was synced, or the memory neither";
    ASSERT_EQ(said.size(), 2u);
    EXPECT_EQ(said[1].rfind("NOT saved  after step 2: read again", 0), 0u) << said[1];
    EXPECT_EQ(loaded_step(run), 1) << name;
  }
}

}  // namespace
}  // namespace moemamba
