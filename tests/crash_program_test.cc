// P1 with the whole program: a rank of a real mpirun is killed at system calls of its saves, the
// same command goes on, and the run ends with the hash chain of one that was never disturbed.
#include <gtest/gtest.h>

#include <chrono>
#include <cstdio>
#include <filesystem>
#include <random>

#include "core/file.h"
#include "tests/support/program.h"
#include "tests/support/soak.h"

namespace moemamba {
namespace {

namespace fs = std::filesystem;

class CrashProgram : public ProgramTest {
 protected:
  // Two ranks; `strace` are its words before those of rank `victim`.
  Result train(int victim, const std::string& strace) const {
    const std::string words = "$moemamba train " + small_training(6) +
                              "--train.save_interval=1 --checkpoint.asynchronous=false "
                              "--checkpoint.hash_interval=1 --train.threads=1";
    put("rank.sh", "[ \"$OMPI_COMM_WORLD_RANK\" = " + std::to_string(victim) +
                       " ] && exec strace -f -o /dev/null " + strace + " " + words + "\nexec " +
                       words + "\n");
    return shell("export moemamba; exec timeout -k 1 60 $mpirun -np 2 sh rank.sh");
  }
  // The last chain and state hash of the run.
  std::string ending() const {
    const std::string metrics = read_file(run() + "/metrics.jsonl");
    std::string text;
    for (const char* field : {"\"chain\":", "\"state_hash\":"}) {
      const size_t at = metrics.rfind(field);
      EXPECT_NE(at, std::string::npos) << metrics;
      if (at != std::string::npos) text += metrics.substr(at, metrics.find_first_of(",}", at) - at);
    }
    return text + " in " + std::to_string(count(metrics, "\n")) + " lines";
  }
};

struct Point {
  int victim;
  const char* call;
  int when;
};

// Where a rank meets its end: in the lease, the claim, shards, manifests, renames, clean-up.
constexpr Point kPoints[] = {{0, "renameat2", 1},   {0, "renameat2", 2}, {0, "renameat2", 4},
                             {0, "fsync", 1},       {0, "fsync", 9},     {0, "fsync", 20},
                             {0, "fsync", 30},      {1, "fsync", 4},     {1, "fsync", 9},
                             {0, "unlink,rmdir", 9}};

TEST_F(CrashProgram, GoesOnToTheSameEndWhereverARankIsKilled) {
  if (shell("strace -f -o /dev/null -e inject=fsync:signal=KILL:when=1 true").code != 0)
    GTEST_SKIP() << "no strace, or no right to trace";
  const Result quiet = train(-1, "");
  ASSERT_EQ(quiet.code, 0) << quiet.err;
  const std::string expected = ending();
  std::mt19937_64 random(test_seed());
  const auto start = std::chrono::steady_clock::now();
  int kills = 0, resumed = 0;
  for (size_t i = 0; i < std::size(kPoints) || std::chrono::steady_clock::now() - start <
                                                   std::chrono::seconds(soak_seconds());
       ++i) {
    Point point = kPoints[i % std::size(kPoints)];
    if (i >= std::size(kPoints)) point.when = 1 + int(random() % 40);
    SCOPED_TRACE(std::string(point.call) + " number " + std::to_string(point.when) + " of rank " +
                 std::to_string(point.victim));
    fs::remove_all(run());
    const Result killed =
        train(point.victim, "-e trace=" + std::string(point.call) + " -e inject=" + point.call +
                                ":signal=KILL:when=" + std::to_string(point.when));
    const bool died = killed.code != 0;
    EXPECT_TRUE(died || i >= std::size(kPoints)) << "there was no such call\n" << killed.err;
    kills += died;
    if (!died) continue;
    const Result next = train(-1, "");
    EXPECT_EQ(next.code, 0) << next.err;
    if (next.code != 0) break;
    resumed += next.err.find("resumed    " + run()) != std::string::npos;
    EXPECT_EQ(ending(), expected) << next.err;
    const size_t said = next.err.find("resumed    ");
    if (i < std::size(kPoints) && said != std::string::npos)
      std::printf("  %s %d of rank %d: %s\n", point.call, point.when, point.victim,
                  next.err.substr(said, next.err.find(';', said) - said).c_str());
  }
  std::printf(
      "P1: %d kills of a rank under mpirun, after %d of them it went on from a checkpoint\n", kills,
      resumed);
}

}  // namespace
}  // namespace moemamba
