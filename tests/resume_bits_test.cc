// A run that was interrupted and went on is, bit for bit, the run that was not.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdio>
#include <filesystem>

#include "core/random.h"
#include "runtime/state_hash.h"
#include "tests/support/small_run.h"
#include "tests/support/soak.h"
#include "tests/support/systems.h"
#include "tests/support/temporary_folder.h"
#include "tests/support/wrapped_files.h"

namespace moemamba {
namespace {

namespace fs = std::filesystem;

// Shards of the newest checkpoint, and the weights that the run ends with.
std::map<std::string, std::string> end_files(const std::string& run) {
  std::map<std::string, std::string> files;
  for (const std::string& folder : {list_checkpoints(run).front().path, join_path(run, "weights")})
    for (const auto& entry : fs::directory_iterator(folder))
      if (entry.path().filename() != kManifestName)  // names the run, which is another one
        files[entry.path().string().substr(run.size())] = read_file(entry.path().string());
  EXPECT_GE(files.size(), 4u) << run;
  return files;
}

void expect_same_run(const std::string& name, const std::string& a, const std::string& b,
                     int64_t steps) {
  const std::vector<std::string> lines = steps_of(a);
  EXPECT_EQ(int64_t(lines.size()), steps) << name;
  EXPECT_EQ(steps_of(b), lines) << name;
  const CheckpointManifest first = newest_manifest(a), second = newest_manifest(b);
  EXPECT_EQ(first.step(), steps) << name;
  EXPECT_EQ(first.chain(), second.chain()) << name;
  EXPECT_EQ(first.state_hash(), second.state_hash()) << name;
  EXPECT_EQ(first.next_sample(), second.next_sample()) << name;
  EXPECT_EQ(second.state_hash(), hash_of_files(list_checkpoints(b).front().path)) << name;
  EXPECT_TRUE(end_files(a) == end_files(b)) << name << ": files differ";
}

// How launches of one run end before the last one: after so many steps of theirs, as asked, or by
// an error before that step, which a checkpoint every `save_interval` steps makes up for.
struct Interruption {
  int64_t steps;
  bool crash = false;
};

struct Interrupted {
  const char* name;
  SmallRun run;
  std::vector<Interruption> launches;
};

void expect_unharmed(const TemporaryFolder& folder, const Interrupted& c) {
  SmallRun run = c.run;
  run.folder = folder / "whole";
  launch(run);
  run.folder = folder / "cut";
  for (const Interruption& end : c.launches) {
    SmallRun part = run;
    part.stop_rank = run.ranks - 1;
    (end.crash ? part.crash_at : part.launch_steps) = end.steps;
    if (end.crash)
      EXPECT_NE(message_of([&] { launch(part); }).find("as the test wants"), std::string::npos);
    else
      EXPECT_TRUE(launch(part).stopped) << c.name;
  }
  EXPECT_FALSE(launch(run).stopped) << c.name;
  expect_same_run(c.name, folder / "whole", run.folder, c.run.steps);
  fs::remove_all(folder / "whole");
  fs::remove_all(folder / "cut");
}

const std::vector<Interruption> kHalf = {{4}};
constexpr const char* kSigmoid =
    "router: SIGMOID router_bias_rate: 0.01 renormalise: true routed_scale: 2.5 top_k: 2 "
    "shared_hidden: 6 expert_activation: SWIGLU";

std::vector<Interrupted> interrupted_runs() {
  return {
      {"one rank", {}, kHalf},
      {"two ranks", {.ranks = 2}, kHalf},
      {"two ranks, experts 2 and 1", {.ranks = 2, .expert = 2}, kHalf},
      {"three ranks", {.ranks = 3, .expert = 3}, kHalf},
      {"four ranks", {.ranks = 4}, kHalf},
      {"four ranks, experts over two", {.ranks = 4, .expert = 2, .experts = 5}, kHalf},
      {"four ranks, experts 2, 1, 1, 1", {.ranks = 4, .expert = 4, .experts = 5}, kHalf},
      {"2 micro-batches", {.micro_batch = 2}, kHalf},
      {"3 micro-batches on two ranks",
       {.ranks = 2, .expert = 2, .batch = 12, .micro_batch = 2},
       kHalf},
      // 200 tokens are 12 windows of 16, three steps of four: before, at and behind the border.
      {"epoch, before its end", {.ranks = 2, .tokens = 200}, {{2}}},
      {"epoch, at its end", {.ranks = 2, .tokens = 200}, {{3}}},
      {"epoch, within the third", {.ranks = 2, .tokens = 200}, {{7}}},
      {"epoch, a batch across the border", {.ranks = 2, .batch = 5, .tokens = 200}, {{3}, {2}}},
      {"circular sampling", {.ranks = 2, .data = "sampling: CIRCULAR"}, kHalf},
      {"sigmoid router with biases", {.ranks = 2, .expert = 2, .model = kSigmoid}, kHalf},
      {"twice without a step in between",
       {.ranks = 2, .expert = 2},
       {{4}, {.steps = 0, .crash = true}, {.steps = 0, .crash = true}}},
      {"after each step", {.ranks = 2, .expert = 2, .steps = 5}, {{1}, {1}, {1}, {1}}},
      {"crashes between checkpoints",
       {.ranks = 2, .expert = 2, .steps = 9, .save_interval = 2},
       {{.steps = 5, .crash = true}, {.steps = 3, .crash = true}, {.steps = 1, .crash = true}}},
      {"a crash before the first checkpoint",
       {.ranks = 2, .save_interval = 5},
       {{.steps = 3, .crash = true}}},
      {"saves that training waits for",
       {.ranks = 2, .save_interval = 1, .asynchronous = false},
       {{.steps = 5, .crash = true}}},
  };
}

TEST(Resume, AtTheSameLayoutIsBitIdentical) {
  TemporaryFolder folder;
  int cases = 0;
  for (const Interrupted& c : interrupted_runs()) {
    expect_unharmed(folder, c);
    ++cases;
  }
  for (const System& system : kSystems) {
    const std::string model = std::string("blocks: 2 width: 24 ") + system.model;
    expect_unharmed(folder,
                    {system.name, {.ranks = 2, .expert = 2, .model = model.c_str()}, kHalf});
    ++cases;
  }
  report_cases("resumed runs that equal uninterrupted ones", cases);
}

// Its last checkpoint is there, its weights are not yet: the same command makes up for them.
TEST(Resume, ARunThatEndedBeforeItsWeightsGetsThem) {
  for (const bool stopped_before : {false, true}) {
    TemporaryFolder folder;
    SmallRun run{.folder = folder / "whole", .ranks = 2, .expert = 2};
    launch(run);
    run.folder = folder / "cut";
    if (stopped_before) {  // so that older weights are there
      SmallRun part = run;
      part.launch_steps = 3;
      launch(part);
    }
    WrappedFiles disk;
    disk.before_write = [](const std::string& path) {
      check(path.find("weights.tmp") == std::string::npos, path, ": cut off, as the test wants");
    };
    SmallRun cut = run;
    cut.files = &disk;
    const std::string said = message_of([&] { launch(cut); });
    EXPECT_NE(said.find("as the test wants"), std::string::npos) << said;
    EXPECT_EQ(newest_manifest(run.folder).step(), run.steps);
    EXPECT_FALSE(launch(run).stopped);
    expect_same_run("weights made up for", folder / "whole", run.folder, run.steps);
    EXPECT_NE(message_of([&] { launch(run); }).find("it is finished"), std::string::npos);
  }
}

// As docs/checkpoint_format.md has it, so that other programs can compute it.
TEST(Resume, TheHashChainIsWhatItsPageSays) {
  HashChain chain;
  std::string digits(64, '0');
  for (int64_t k = 0; k < 3; ++k) {
    const double loss = 1.5 + double(k), norm = 0.25;
    chain.add({.step = k, .loss = loss, .grad_norm = norm, .first_sample = 8 * k, .samples = 8});
    const uint64_t words[] = {uint64_t(k), std::bit_cast<uint64_t>(loss),
                              std::bit_cast<uint64_t>(norm), uint64_t(8 * k), 8};
    digits = sha256(digits + std::string(reinterpret_cast<const char*>(words), sizeof words));
    EXPECT_EQ(chain.text().data(), digits);
  }
  // What is not a number has the bits of the quiet NaN, whichever it was.
  chain.add({.step = 3,
             .loss = std::nan(""),
             .grad_norm = -std::nan("7"),
             .first_sample = 0,
             .samples = 8});
  const uint64_t words[] = {3, 0x7ff8000000000000, 0x7ff8000000000000, 0, 8};
  digits = sha256(digits + std::string(reinterpret_cast<const char*>(words), sizeof words));
  EXPECT_EQ(chain.text().data(), digits);
}

// Asked in its last step, a run is done, not stopped: nothing is left to start again for.
TEST(Resume, ARunThatIsAskedToStopInItsLastStepIsDone) {
  TemporaryFolder folder;
  const SmallRun run{.folder = folder / "run", .ranks = 2, .steps = 4, .launch_steps = 4};
  EXPECT_FALSE(launch(run).stopped);
  EXPECT_EQ(newest_manifest(run.folder).step(), 4);
}

// What the tests above are worth: another seed, and a run that begins again, are not the same run.
TEST(Resume, AnotherRunIsAnother) {
  TemporaryFolder folder;
  launch({.folder = folder / "a"});
  launch({.folder = folder / "b", .seed = 43});
  EXPECT_NE(newest_manifest(folder / "a").chain(), newest_manifest(folder / "b").chain());
  EXPECT_NE(newest_manifest(folder / "a").state_hash(), newest_manifest(folder / "b").state_hash());
  EXPECT_NE(steps_of(folder / "a"), steps_of(folder / "b"));
}

// Long part: crashes at random steps of random launches.
TEST(Resume, CrashesAtRandomSteps) {
  TemporaryFolder folder;
  const SmallRun whole{.folder = folder / "whole",
                       .ranks = 2,
                       .expert = 2,
                       .steps = 24,
                       .save_interval = 3,
                       .model = kSigmoid};
  launch(whole);
  const Random random(test_seed(), "crashes");
  uint64_t draw = 0;
  int64_t crashes = 0, runs = 0;
  const auto start = std::chrono::steady_clock::now();
  const auto quick = std::chrono::seconds(soak_seconds());
  do {
    SmallRun run = whole;
    run.folder = folder / "cut";
    for (bool done = false; !done;) {
      SmallRun part = run;
      part.crash_at = int64_t(random.uniform(draw++) * 12);
      try {
        launch(part);
        done = true;
      } catch (const Error& error) {
        ASSERT_NE(std::string(error.what()).find("as the test wants"), std::string::npos)
            << error.what();
        ++crashes;
      }
      // What ended before its first checkpoint makes no headway: at most so often.
      ASSERT_LT(draw, 100'000'000u);
    }
    expect_same_run("random crashes", whole.folder, run.folder, whole.steps);
    fs::remove_all(run.folder);
    ++runs;
  } while (runs < 5 || std::chrono::steady_clock::now() - start < quick);
  std::printf("runs to their end: %lld\n", static_cast<long long>(runs));
  report_cases("crashes between steps, resumed", crashes);
}

}  // namespace
}  // namespace moemamba
