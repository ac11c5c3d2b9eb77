// P1 atomic and P18 safe clean-up: a launch or a save is killed at every call of the file system.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <set>

#include "tests/support/checkpoint_cases.h"
#include "tests/support/in_world.h"
#include "tests/support/seam_files.h"
#include "tests/support/soak.h"

namespace moemamba {
namespace {

namespace fs = std::filesystem;

enum class Moment : uint8_t { before, halfway, after };
constexpr Moment kMoments[] = {Moment::before, Moment::halfway, Moment::after};

// Counts a rank's calls and dies at one of them; `die` does not return.
class KillingFiles : public SeamFiles {
 public:
  KillingFiles(int64_t at, Moment moment, std::function<void()> die) {
    before = [this, at, moment, die](FileCall& call) {
      const bool now = calls++ == at;
      if (now) at_write = call.what == Call::write;
      if (now && moment == Moment::before) die();
      if (now && moment == Moment::halfway) call.bytes /= 2;
      return true;
    };
    after = [this, at, moment, die](const FileCall& call) {
      if (call.what == Call::rename_new && call.to.find("/step-") != std::string::npos)
        published_ = true;
      if (call.what == Call::link && call.to.ends_with(kManifestName)) published_ = true;
      if (call.what == Call::sync_folder && call.path.ends_with("/checkpoints") && published_)
        durable = true;
      if (calls == at + 1 && moment != Moment::before) die();
    };
  }
  int64_t calls = 0;
  bool durable = false;   // the new checkpoint is committed
  bool at_write = false;  // the deadly call is one

 private:
  bool published_ = false;
};

// What the dying process leaves for the one that looks.
struct Shared {
  std::atomic<bool> durable, ended, at_write;
};

Shared* shared_memory() {
  void* memory =
      mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  EXPECT_NE(memory, MAP_FAILED);
  return new (memory) Shared{};
}

struct Scenario {
  const char* name;
  std::function<void(const std::string& run)> prepare;
  int64_t old_step;  // what a loader finds before
  int64_t new_step;  // and after
  bool overwrite = false, renames_new = true;
  Retention retention = {};
  int ranks = 2, expert = 2;
};

void saves(const std::string& run, std::initializer_list<int64_t> steps) {
  fs::create_directories(run);
  write_file(plain_disk(), run + "/config.textproto", "train { steps: 9 }\n");
  for (int64_t step : steps)
    for (const std::string& verdict : save({.run = run, .step = step, .generation = 0}))
      ASSERT_EQ(verdict, "");
}

std::string place(const std::string& run, int64_t step) {
  return join_path(checkpoints_folder(run), checkpoint_name(step));
}

std::vector<Scenario> scenarios() {
  const auto nothing = [](const std::string&) {};
  const auto one = [](const std::string& run) { saves(run, {1}); };
  const auto three = [](const std::string& run) { saves(run, {1, 2, 3}); };
  const auto damaged = [](const std::string& run) {
    saves(run, {1, 2, 3});
    flip_bit(place(run, 2) + "/model-00002-of-00002.safetensors", 12345);
    fs::remove(place(run, 3) + "/MANIFEST.pb");
  };
  const auto halves = [](const std::string& run) {  // what a death amid links leaves
    saves(run, {1, 2});
    const std::string attempt = join_path(checkpoints_folder(run), attempt_name(2, 0, 7));
    fs::copy(place(run, 2), attempt);
    fs::remove(place(run, 2) + "/MANIFEST.pb");
  };
  return {
      {"first launch, one rank", nothing, 0, 1, false, true, {}, 1, 1},
      {"first launch", nothing, 0, 1},
      {"second save", one, 1, 2},
      {"clean-up", three, 3, 4, false, true, {.keep_last = 1}},
      {"damaged ones set aside", damaged, 1, 2},
      {"first launch, by links", nothing, 0, 1, false, false},
      {"second save, by links", one, 1, 2, false, false},
      {"damaged ones set aside, by links", damaged, 1, 2, false, false},
      {"after half a publication", halves, 1, 2, false, false},
      {"overwriting", three, -2, 1, true, true},
  };
}

// The launch of a scenario in a process of its own that dies at call `at` of `rank`. Returns
// whether it died there; false: it had fewer calls.
bool dying_launch(const Scenario& s, const std::string& run, int rank, int64_t at, Moment moment,
                  bool& durable, bool& at_write) {
  Shared* shared = shared_memory();
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    std::vector<std::unique_ptr<KillingFiles>> disks;
    for (int r = 0; r < s.ranks; ++r) {
      const int64_t when = r == rank ? at : int64_t{1} << 40;
      disks.push_back(std::make_unique<KillingFiles>(when, moment, [&] {
        shared->durable = disks[0]->durable;
        shared->at_write = disks[size_t(rank)]->at_write;
        kill(getpid(), SIGKILL);
        pause();
      }));
      disks.back()->renames_new = s.renames_new;
    }
    launch({.run = run,
            .disks = [&](int r) -> FileSystem& { return *disks[size_t(r)]; },
            .overwrite = s.overwrite,
            .ranks = s.ranks,
            .expert = s.expert,
            .retention = s.retention});
    shared->ended = true;
    _exit(testing::Test::HasFailure() ? 3 : 0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  const bool died = WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
  EXPECT_TRUE(died || (WIFEXITED(status) && WEXITSTATUS(status) == 0)) << s.name << " " << at;
  durable = shared->durable || shared->ended;
  at_write = shared->at_write;
  munmap(shared, sizeof *shared);
  return died;
}

std::vector<std::string> leftovers(const std::string& run) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(checkpoints_folder(run))) {
    const std::string name = entry.path().filename().string();
    const bool known =
        step_of_name(name) || name == "LATEST" || name.find(".damaged-") != std::string::npos;
    if (!known) names.push_back(name);
  }
  return names;
}

void expect_old_or_new(const Scenario& s, const std::string& run, bool durable) {
  std::string why;
  // As a reader would: what is damaged stays in its place for the launch that follows.
  MemoryFolder copy("crash-kill-copy");
  fs::copy(run, copy / "run", fs::copy_options::recursive);
  const int64_t found = loaded_step(copy / "run", 99, &why);
  if (s.old_step == -2) return;  // overwriting destroys the old, step by step
  EXPECT_TRUE(found == s.new_step || (found == s.old_step && !durable))
      << "found " << found << " " << why << (durable ? ", though committed" : "");
}

void expect_goes_on(const Scenario& s, const std::string& run) {
  const auto start = std::chrono::steady_clock::now();
  try {
    const LaunchResult next = launch({.run = run,
                                      .disks = {},
                                      .overwrite = s.overwrite,
                                      .ranks = s.ranks,
                                      .expert = s.expert,
                                      .retention = s.retention});
    EXPECT_EQ(next.problem, "");
    EXPECT_TRUE(next.loaded == s.new_step || next.loaded == s.old_step || s.overwrite);
    EXPECT_EQ(loaded_step(run), next.loaded + 1);
  } catch (const std::exception& error) {
    ADD_FAILURE() << "the next launch fails: " << error.what();
  }
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5));
  EXPECT_EQ(leftovers(run), std::vector<std::string>());
}

int64_t kill_everywhere(const Scenario& s) {
  int64_t cases = 0;
  MemoryFolder folder("crash-kill");
  const std::string original = folder / "original", run = folder / "run";
  s.prepare(original);
  for (int rank = 0; rank < s.ranks; ++rank) {
    std::set<int64_t> writes;
    int64_t calls = 0;
    for (Moment moment : kMoments) {
      bool died = true;
      for (int64_t at = 0; died && at < 1000; ++at) {
        // Half of a call there is only of a write; and after one call is before the next, but for
        // what other ranks do meanwhile: a sample will do, if there is not much time.
        if (moment == Moment::halfway && at < calls && !writes.count(at)) continue;
        if (moment == Moment::after && soak_seconds() == 0 && at < calls && at % 4 != 0) continue;
        SCOPED_TRACE(concat(s.name, ": rank ", rank, " call ", at, " moment ", int(moment)));
        fs::remove_all(run);
        if (fs::exists(original)) fs::copy(original, run, fs::copy_options::recursive);
        bool durable = false, at_write = false;
        died = dying_launch(s, run, rank, at, moment, durable, at_write);
        if (at_write) writes.insert(at);
        calls = std::max(calls, at);
        ++cases;
        if (fs::exists(run)) expect_old_or_new(s, run, durable);
        expect_goes_on(s, run);
        if (testing::Test::HasFailure()) return cases;
      }
    }
  }
  return cases;
}

TEST(Kill, LeavesTheOldOrTheNewCheckpointWhereverItStrikes) {
  const auto start = std::chrono::steady_clock::now();
  int64_t cases = 0;
  for (int round = 0; round == 0 || std::chrono::steady_clock::now() - start <
                                        std::chrono::seconds(soak_seconds());
       ++round)
    for (const Scenario& s : scenarios()) {
      const int64_t before = cases;
      cases += kill_everywhere(s);
      if (round == 0)
        std::printf("  %-34s %4lld kills\n", s.name, static_cast<long long>(cases - before));
      if (HasFailure()) break;
    }
  std::printf("P1, P18: %lld kills of a launch, all ranks at once\n",
              static_cast<long long>(cases));
}

TEST(CleanUp, TouchesNothingThatItCannotRead) {
  MemoryFolder folder("crash-clean");
  const std::string run = folder / "run", there = checkpoints_folder(run);
  saves(run, {1, 2, 3});
  fs::create_directories(folder / "elsewhere/deep");
  write_file(plain_disk(), folder / "elsewhere/deep/file", "precious");
  fs::create_directory_symlink(folder / "elsewhere", there + "/.trash-link");
  fs::create_directory_symlink(folder / "elsewhere", there + "/step-00000001.tmp-0-5");
  fs::create_directory_symlink(folder / "elsewhere", there + "/step-00000009");
  for (const char* name : {"notes", "step-1", "step-00000001.tmp-x-1", "step-00000001.tmp-0",
                           "step-00000002.bak", "step-00000001.tmp-9-1", ".trasher"})
    fs::create_directories(there + "/" + name);
  collect_garbage(plain_disk(), run, 8, {.keep_last = 1});
  EXPECT_EQ(read_file(folder / "elsewhere/deep/file"), "precious");
  std::set<std::string> left;
  for (const auto& entry : fs::directory_iterator(there)) left.insert(entry.path().filename());
  EXPECT_EQ(left,
            (std::set<std::string>{"step-00000003", "step-00000009", "notes", "step-1",
                                   "step-00000001.tmp-x-1", "step-00000001.tmp-0",
                                   "step-00000002.bak", "step-00000001.tmp-9-1", ".trasher"}));
  EXPECT_EQ(loaded_step(run, 1), 3);
}

// One rank dies, the others learn of it when they wait for it, as mpirun would have it.
TEST(Kill, OfOneRankLeavesTheOldOrTheNewCheckpoint) {
  struct Killed {};  // no std::exception: nothing that tidies up runs
  int64_t cases = 0;
  for (bool renames_new : {true, false})
    for (auto [ranks, victim] : {std::pair{2, 0}, {2, 1}, {3, 2}})
      for (Moment moment : {Moment::before, Moment::halfway}) {  // halfway: else after
        bool died = true;
        for (int64_t at = 0; died && at < 1000; ++at, ++cases) {
          SCOPED_TRACE(concat("rank ", victim, " of ", ranks, " call ", at));
          MemoryFolder folder("crash-kill-one");
          const std::string run = folder / "run";
          saves(run, {1});
          died = false;
          std::vector<std::unique_ptr<KillingFiles>> disks;
          for (int r = 0; r < ranks; ++r) {
            disks.push_back(
                std::make_unique<KillingFiles>(r == victim ? at : int64_t{1} << 40, moment, [&] {
                  died = true;
                  throw Killed{};
                }));
            disks.back()->renames_new = renames_new;
          }
          std::vector<std::string> verdicts;
          try {
            in_world(RankLayout(ranks, 1, kStateExperts), [&, victim = victim](ProcessGroups& g) {
              StateHolder holder(g);
              holder.fill(2);
              CheckpointWriter writer(
                  *disks[size_t(g.rank)], g, holder.store,
                  {.run = run, .generation = 0, .may_write = {}, .block_bytes = kDirectBlock});
              writer.stage();
              try {
                EXPECT_EQ(writer.write(facts_of(2)), "");
                EXPECT_FALSE(died && g.rank == victim);
              } catch (const Killed&) {
                g.abort("killed");
              }
            });
          } catch (const PeerLost&) {
          }
          const Scenario s{"", {}, 1, 2, false, true, {}, ranks, 1};
          expect_old_or_new(s, run, disks[0]->durable || !died);
          expect_goes_on(s, run);
          if (HasFailure()) return;
        }
      }
  std::printf("P1: %lld kills of one rank in a save\n", static_cast<long long>(cases));
}

}  // namespace
}  // namespace moemamba
