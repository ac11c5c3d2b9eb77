// P7 all ranks of a save get the same verdict, P8 within the deadline, whatever one of them does.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <mutex>
#include <new>
#include <random>
#include <stdexcept>

#include "tests/support/checkpoint_cases.h"
#include "tests/support/in_world.h"
#include "tests/support/seam_files.h"
#include "tests/support/soak.h"

namespace moemamba {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

struct Trouble {
  const char* name;
  std::function<void()> act;
  milliseconds deadline = std::chrono::seconds(20);
};

struct Saved {
  std::vector<std::string> verdicts;
  bool reached = false;
  double seconds = 0;
};

// A save of step 2 on `ranks` ranks, of which one meets trouble at its call `at`.
Saved troubled_save(const std::string& run, int ranks, int victim, int64_t at,
                    const Trouble& trouble) {
  fs::remove_all(run);
  fs::create_directories(run);
  EXPECT_EQ(save({.run = run, .step = 1, .ranks = ranks, .expert = 1})[0], "");
  Saved saved;
  SeamFiles bad, good;
  int64_t calls = 0;
  bad.before = [&](FileCall&) {
    if (calls++ != at) return true;
    saved.reached = true;
    trouble.act();
    return true;
  };
  const auto start = Clock::now();
  saved.verdicts =
      save({.run = run,
            .step = 2,
            .disks = [&](int rank) -> FileSystem& { return rank == victim ? bad : good; },
            .ranks = ranks,
            .expert = 1,
            .deadline = trouble.deadline});
  saved.seconds = std::chrono::duration<double>(Clock::now() - start).count();
  return saved;
}

int64_t everywhere(const Trouble& trouble, bool dies_late, int64_t stride = 1) {
  MemoryFolder folder("crash-votes");
  const std::string run = folder / "run";
  const int ranks = 3;
  int64_t cases = 0;
  for (int victim = 0; victim < ranks; ++victim)
    for (int64_t at = int64_t(test_seed() % uint64_t(stride)); at < 300; at += stride, ++cases) {
      SCOPED_TRACE(concat(trouble.name, " at call ", at, " of rank ", victim));
      const Saved saved = troubled_save(run, ranks, victim, at, trouble);
      const auto lost = [](const std::string& v) { return v.rfind("lost: ", 0) == 0; };
      for (const std::string& verdict : saved.verdicts) {
        // The same words; or, where the deadline passed, nobody has any.
        EXPECT_TRUE(verdict == saved.verdicts[0] ||
                    (dies_late && lost(verdict) == lost(saved.verdicts[0])))
            << verdict << "\nbut rank 0: " << saved.verdicts[0];
        EXPECT_TRUE(dies_late || !lost(verdict)) << verdict;
      }
      EXPECT_LT(saved.seconds, 5);
      const int64_t found = loaded_step(run);
      EXPECT_TRUE(found == 2 || (found == 1 && !saved.verdicts[0].empty())) << found;
      if (!saved.reached || testing::Test::HasFailure()) break;
    }
  return cases;
}

TEST(Votes, AreOneVerdictWhereverARankThrows) {
  const int64_t errors = everywhere(
      {"an Error", [] { throw Error("the disk of this rank is gone (injected)"); }}, false);
  const int64_t others =
      everywhere({"no memory", [] { throw std::bad_alloc(); }}, false) +
      everywhere({"another exception", [] { throw std::runtime_error(""); }}, false);
  std::printf("P7: %lld thrown Errors, %lld other exceptions in a save of 3 ranks\n",
              static_cast<long long>(errors), static_cast<long long>(others));
}

TEST(Votes, WaitForASlowRank) {
  const int64_t stride = soak_seconds() > 0 ? 1 : 5;
  const int64_t cases =
      everywhere({"60 ms", [] { std::this_thread::sleep_for(milliseconds(60)); }}, false, stride);
  std::printf("P8: %lld slow ranks, waited for\n", static_cast<long long>(cases));
}

TEST(Votes, AreGivenUpByAllAtTheDeadline) {
  const int64_t stride = soak_seconds() > 0 ? 1 : 5;
  const int64_t cases = everywhere(
      {"a silence", [] { std::this_thread::sleep_for(milliseconds(500)); }, milliseconds(100)},
      true, stride);
  std::printf("P8: %lld ranks silent past the deadline, given up by all\n",
              static_cast<long long>(cases));
}

// When the ranks that did not fall silent have given up a save; rank 1 is silent for a second at
// its call `at`. Less than nothing: it has no such call.
double given_up_after(int64_t at, milliseconds deadline) {
  MemoryFolder folder("crash-votes");
  const std::string run = folder / "run";
  fs::create_directories(run);
  SeamFiles silent;
  int64_t calls = 0;
  silent.before = [&](FileCall&) {
    if (calls++ == at) std::this_thread::sleep_for(milliseconds(1000));
    return true;
  };
  std::vector<double> seconds(3);
  save({.run = run,
        .step = 1,
        .disks = [&](int rank) -> FileSystem& { return rank == 1 ? silent : plain_disk(); },
        .ranks = 3,
        .expert = 1,
        .deadline = deadline,
        .seconds = &seconds});
  return calls > at ? std::max(seconds[0], seconds[2]) : -1;
}

// The test of the test: what bounds a save in time is the deadline and nothing else. Without one
// the others wait for a silent rank as long as it likes to be silent.
TEST(Votes, AreUnboundedWithoutTheDeadline) {
  const int64_t stride = soak_seconds() > 0 ? 1 : 4;
  int64_t cases = 0;
  for (int64_t at = 0; at < 300; at += stride, ++cases) {
    SCOPED_TRACE(concat("call ", at));
    const double bounded = given_up_after(at, milliseconds(100));
    if (bounded < 0) break;
    EXPECT_LT(bounded, 0.9);
    const double unbounded = given_up_after(at, std::chrono::hours(1));
    EXPECT_GT(unbounded, 0.95) << "not noticed: no deadline";
    if (cases == 0)
      std::printf("  a rank is silent for 1 s: the others give up after %.2f s, without a deadline "
                  "after %.2f s\n",
                  bounded, unbounded);
  }
  EXPECT_GE(cases, 2);
  std::printf("P8: %lld silent ranks, with the deadline and without\n",
              static_cast<long long>(cases));
}

// Every rank in turn meets a random trouble, by seed.
TEST(Votes, HoldUnderRandomTroubleOfSeveralRanks) {
  MemoryFolder folder("crash-votes");
  const auto start = Clock::now();
  int64_t rounds = 0, saved = 0;
  for (uint64_t seed = test_seed() * 1000000;
       rounds < 150 || Clock::now() - start < std::chrono::seconds(soak_seconds()); ++seed) {
    SCOPED_TRACE(concat("seed ", seed));
    const std::string run = folder / "run";
    fs::remove_all(run);
    fs::create_directories(run);
    const int ranks = 1 + int(seed % 4);
    EXPECT_EQ(save({.run = run, .step = 1, .ranks = ranks, .expert = 1})[0], "");
    std::vector<SeamFiles> disks(static_cast<size_t>(ranks));
    std::vector<std::mt19937_64> random;
    for (int r = 0; r < ranks; ++r) random.emplace_back(seed * 8 + uint64_t(r));
    for (int r = 0; r < ranks; ++r)
      disks[size_t(r)].before = [&, r](FileCall& call) {
        const uint64_t dice = random[size_t(r)]() % 100;
        if (dice < 10) std::this_thread::sleep_for(std::chrono::microseconds(dice * 300));
        check(dice != 99, call.path, ": (injected)");
        return true;
      };
    const auto verdicts = save({.run = run,
                                .step = 2,
                                .disks = [&](int r) -> FileSystem& { return disks[size_t(r)]; },
                                .ranks = ranks,
                                .expert = 1});
    for (const std::string& verdict : verdicts) EXPECT_EQ(verdict, verdicts[0]);
    const int64_t found = loaded_step(run);
    EXPECT_TRUE(found == 2 || (found == 1 && !verdicts[0].empty())) << verdicts[0];
    saved += verdicts[0].empty();
    ++rounds;
    if (HasFailure()) break;
  }
  std::printf("P7: %lld saves under random trouble, %lld of them succeeded, seed %llu\n",
              static_cast<long long>(rounds), static_cast<long long>(saved),
              static_cast<unsigned long long>(test_seed()));
}

}  // namespace
}  // namespace moemamba
