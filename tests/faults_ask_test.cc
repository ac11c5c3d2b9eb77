// A run that is asked to end, that is started twice, and whose disk is full for a while.
#include <signal.h>
#include <sys/mount.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>

#include "core/random.h"
#include "tests/support/fault_test.h"
#include "tests/support/small_run.h"
#include "tests/support/soak.h"

namespace moemamba {
namespace {

using Clock = Launched::Clock;
constexpr int64_t kEndless = 1'000'000'000, kMostSteps = 20'000;
constexpr double kGrace = 30;  // seconds from SIGTERM to a scheduler's SIGKILL

// Whether a test's share of the soak lasts on.
class Share {
 public:
  explicit Share(double share) : seconds_(double(soak_seconds()) * share) {}
  bool lasts() const { return seconds_since(begin_) < seconds_; }

 private:
  Clock::time_point begin_ = Clock::now();
  double seconds_;
};

class FaultAsk : public FaultTest {};

// Whether a process has begun to see to its signals. Until then, while it is being loaded, they end
// it as they end any program.
bool sees_to_signals(pid_t id) {
  std::ifstream status(concat("/proc/", id, "/status"));
  for (std::string word; status >> word;)
    if (word == "SigCgt:" && status >> word)
      return (std::stoull(word, nullptr, 16) >> (SIGTERM - 1) & 1) != 0;
  return false;
}

TEST_F(FaultAsk, ByATerminationSavesAllOfItWithinTheGrace) {
  const Random random(test_seed(), "terminations");
  uint64_t draw = 0;
  FaultTable table;
  const Share share(0.35);
  constexpr const char* kEnd = "SIGTERM, to the end";
  constexpr const char* kStart = "SIGTERM amid the start, to the end";
  constexpr const char* kAgain = "the command after SIGTERM";
  while (!HasFailure() && (table.cases(kEnd) < 3 || share.lasts())) {
    if (file_exists(run()) && Launched(*this / "", run(), "").steps() > kMostSteps) clear();
    Launched launched(*this / "", run(), words(kEndless));
    const int64_t done = launched.steps();
    launched.start();
    // One in four meets the start, but for the first: there is nothing to save then.
    const bool early = table.cases() > 0 && random.uniform(draw++) < 0.25;
    const auto begun = Clock::now();
    if (!early) {
      ASSERT_TRUE(wait_until([&] { return launched.steps() > done; }, kPatience))
          << launched.said();
      if (done > 0) table.add(kAgain, -1, seconds_since(begun), 0);
    }
    pause_for(random.uniform(draw++) * (early ? 1.0 : 0.5));
    ASSERT_TRUE(wait_until([&] { return sees_to_signals(launched.supervisor()); }, kPatience));
    const Launched::Before before = launched.before();
    kill(launched.supervisor(), SIGTERM);
    EXPECT_EQ(launched.end(kGrace), 75) << launched.said();
    table.add(early ? kStart : kEnd, -1, seconds_since(before.time), 0);
    expect_nothing_left(launched);
    const int64_t steps = launched.steps();
    EXPECT_GE(steps, before.steps);
    if (steps > 0) {
      EXPECT_EQ(newest_manifest(run()).step(), steps) << launched.said();
    }
  }
  const std::vector<double> steps = numbers_of(read_file(run() + "/metrics.jsonl"), "step");
  for (size_t i = 0; i < steps.size(); ++i) ASSERT_EQ(steps[i], double(i));
  table.print();
}

// `other` has been started beside `works`: it ends within 2 s, naming that; and 3 for a busy
// machine.
void expect_refused(Launched& other, const Launched& works, Clock::time_point begin,
                    const char* kind, FaultTable& table) {
  const double seconds = seconds_since(begin);
  EXPECT_LT(seconds, 2 + 3);
  EXPECT_EQ(other.end(1), 1) << other.said();
  EXPECT_EQ(count(other.said(), "process " + std::to_string(works.supervisor())), 1)
      << other.said();
  table.add(kind, seconds, -1, 0);
}

TEST_F(FaultAsk, TwiceOneWorksAndTheOtherEndsNamingIt) {
  const Random random(test_seed(), "two supervisors");
  uint64_t draw = 0;
  FaultTable table;
  const Share share(0.35);
  const std::string command = words(kEndless);
  do {
    {
      Launched one(*this / "", run(), command, nullptr, "said");
      Launched two(*this / "", run(), command, nullptr, "said-too");
      const auto begin = Clock::now();
      one.start();
      two.start();
      ASSERT_TRUE(wait_until([&] { return one.has_ended() || two.has_ended(); }, kPatience));
      Launched& works = one.has_ended() ? two : one;
      expect_refused(one.has_ended() ? one : two, works, begin, "two supervisors at once", table);
      EXPECT_TRUE(works.wait_for_steps(1, kPatience)) << works.said();
      kill(works.supervisor(), SIGTERM);
      EXPECT_EQ(works.end(kGrace), 75) << works.said();
    }
    clear();
    Launched works(*this / "", run(), command, nullptr, "said");
    works.start();
    ASSERT_TRUE(works.wait_for_steps(1, kPatience)) << works.said();
    const std::vector<pid_t> ranks = works.processes().ranks;
    for (int i = 0; i < 4 && !HasFailure(); ++i) {
      pause_for(random.uniform(draw++) * 0.3);
      Launched other(*this / "", run(), command, nullptr, "said-too");
      other.forget();  // the run is not its own
      const auto begin = Clock::now();
      other.start();
      ASSERT_TRUE(wait_until([&] { return other.has_ended(); }, kPatience)) << other.said();
      expect_refused(other, works, begin, "a second supervisor", table);
      std::filesystem::remove(*this / "said-too");
      ASSERT_TRUE(works.wait_for_steps(5, kPatience)) << works.said();
      EXPECT_EQ(works.processes().ranks, ranks);
      EXPECT_EQ(works.attempt(), 1);
    }
    kill(works.supervisor(), SIGTERM);
    EXPECT_EQ(works.end(kGrace), 75) << works.said();
    clear();
  } while (!HasFailure() && share.lasts());
  table.print();
}

// A file system of its own that is full at once, and has space again.
class SmallDisk {
 public:
  explicit SmallDisk(const std::string& folder) : folder_(folder) {
    std::filesystem::create_directories(folder);
    check(mount("none", folder.c_str(), "tmpfs", 0, "size=32m") == 0, "cannot mount a tmpfs");
  }
  ~SmallDisk() { umount2(folder_.c_str(), MNT_DETACH); }
  SmallDisk(const SmallDisk&) = delete;
  SmallDisk& operator=(const SmallDisk&) = delete;
  void fill() const {
    std::FILE* file = std::fopen(filler().c_str(), "ab");
    check(file != nullptr, "cannot write ", filler());
    std::setvbuf(file, nullptr, _IONBF, 0);
    static constexpr char kBytes[4096] = {};
    while (std::fwrite(kBytes, 1, sizeof kBytes, file) == sizeof kBytes) {
    }
    std::fclose(file);
  }
  void empty() const { std::filesystem::remove(filler()); }

 private:
  std::string filler() const { return folder_ + "/filler"; }
  std::string folder_;
};

TEST_F(FaultAsk, OfAFullDiskGoesOnAndSavesWhenThereIsSpace) {
  if (getuid() != 0) GTEST_SKIP() << "a small disk cannot be mounted here: that needs root";
  const Random random(test_seed(), "full disks");
  uint64_t draw = 0;
  FaultTable table;
  const Share share(0.3);
  do {
    const SmallDisk disk(*this / "disk");
    const std::string there = *this / "disk/run";
    std::string command = words(kEndless) + " --checkpoint.max_failed_saves=1000000";
    command.replace(command.find(run()), run().size(), there);
    Launched launched(*this / "", there, command);
    launched.start();
    ASSERT_TRUE(wait_until([&] { return launched.is_saved(); }, kPatience)) << launched.said();
    while (!HasFailure() && launched.steps() < kMostSteps / 2) {
      pause_for(random.uniform(draw++) * 0.3);
      const std::vector<pid_t> ranks = launched.processes().ranks;
      const size_t failed = launched.events("save_failed").size();
      const Launched::Before before = launched.before();
      // A full disk takes no events: they come afterwards. On a busy machine no save may have been
      // due in that time.
      double seconds = 0.3 + random.uniform(draw++);
      auto space = Clock::now();
      for (; launched.events("save_failed").size() == failed && seconds < 60; seconds *= 2) {
        const auto full = Clock::now();
        while (seconds_since(full) < seconds) {
          disk.fill();  // again: older checkpoints may have gone
          pause_for(0.005);
        }
        disk.empty();
        space = Clock::now();
        const size_t saved = launched.events("saved").size();
        EXPECT_TRUE(wait_until([&] { return launched.events("saved").size() > saved; }, kPatience))
            << launched.said();
      }
      EXPECT_GT(launched.events("save_failed").size(), failed) << launched.said();
      EXPECT_EQ(launched.attempt(), before.attempt);
      EXPECT_EQ(launched.processes().ranks, ranks);
      EXPECT_GT(launched.steps(), before.steps);
      table.add("full disk: to the next save", -1, seconds_since(space), 0);
      if (soak_seconds() == 0) break;
    }
    kill(launched.supervisor(), SIGTERM);
    EXPECT_EQ(launched.end(kGrace), 75) << launched.said();
    expect_nothing_left(launched);
    EXPECT_EQ(newest_manifest(there).step(), launched.steps());
    std::filesystem::remove(*this / "said");
  } while (!HasFailure() && share.lasts());
  table.print();
}

}  // namespace
}  // namespace moemamba
