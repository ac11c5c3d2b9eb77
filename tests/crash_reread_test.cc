// The newest checkpoint that was read whole is always kept: a disk that damages what it is given,
// and says nothing, costs no more than the new ones.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <thread>

#include "tests/support/checkpoint_cases.h"
#include "tests/support/in_world.h"
#include "tests/support/seam_files.h"
#include "tests/support/small_run.h"
#include "tests/support/soak.h"
#include "tests/support/temporary_folder.h"

namespace moemamba {
namespace {

namespace fs = std::filesystem;

const std::string kShard = "optimizer-exp_avg-00002-of-00002.safetensors";  // the damaged one

using Damage = std::function<void(const std::string& checkpoint, int64_t step)>;

// Whether this call has just made a checkpoint that is there for good.
bool publishes(const FileCall& call) {
  return (call.what == Call::rename_new && step_of_name(fs::path(call.to).filename())) ||
         (call.what == Call::link && call.to.ends_with(kManifestName));
}

struct Saves {
  std::string run;
  int64_t last = 6;
  Damage damage = {};  // of a checkpoint that has just come to be
  bool verify = true, asynchronous = true, renames_new = true;
  int ranks = 2, expert = 2;
  std::function<bool()> may_write = {};
};
struct Saved {
  std::vector<std::string> said;
  int64_t failed = 0;
};

// Saves of steps 1 to `last`, of which the two newest are kept.
Saved save_all(const Saves& c) {
  Saved saved;
  in_world(RankLayout(c.ranks, c.expert, kStateExperts), [&](ProcessGroups& groups) {
    StateHolder holder(groups);
    SeamFiles files;
    files.renames_new = c.renames_new;
    files.after = [&](const FileCall& call) {
      if (!publishes(call) || !c.damage) return;
      const fs::path place =
          call.what == Call::link ? fs::path(call.to).parent_path() : fs::path(call.to);
      c.damage(place.string(), *step_of_name(place.filename()));
    };
    Checkpoints checkpoints(files, groups, holder.store,
                            {.writer = {.run = c.run, .generation = 1, .may_write = c.may_write},
                             .asynchronous = c.asynchronous,
                             .verify = c.verify,
                             .retention = {.keep_last = 2},
                             .max_failed = 100,
                             .say = [&](const std::string& text) { saved.said.push_back(text); }});
    for (int64_t step = 1; step <= c.last; ++step) {
      checkpoints.finish();
      holder.fill(uint64_t(step));
      checkpoints.save(facts_of(step));
    }
    checkpoints.finish();
    if (groups.rank == 0) saved.failed = checkpoints.failed();
  });
  return saved;
}

std::vector<int64_t> steps_there(const std::string& run) {
  std::vector<int64_t> steps;
  for (const CheckpointPlace& place : list_checkpoints(run)) steps.push_back(place.step);
  return steps;
}

TEST(Reread, KeepsTheNewestThatHeldOnADiskThatDamagesEveryLaterOne) {
  for (bool asynchronous : {true, false})
    for (bool renames_new : {true, false}) {
      MemoryFolder folder("crash-reread");
      const Saves c{.run = folder / "run",
                    .last = 6,
                    .damage =
                        [](const std::string& checkpoint, int64_t step) {
                          if (step > 2 && step < 6) flip_bit(checkpoint + "/" + kShard, 999 + step);
                        },
                    .asynchronous = asynchronous,
                    .renames_new = renames_new};
      Saves some = c;
      some.last = 5;
      const Saved saved = save_all(some);
      EXPECT_EQ(saved.failed, 3);
      ASSERT_EQ(saved.said.size(), 5u);
      EXPECT_EQ(saved.said[1].rfind("saved      step-00000002", 0), 0u) << saved.said[1];
      for (int64_t step : {3, 4, 5}) {
        const std::string& line = saved.said[size_t(step) - 1];
        EXPECT_EQ(line.rfind(concat("NOT saved  after step ", step, ": read again"), 0), 0u)
            << line;
        EXPECT_NE(line.find(concat(kShard, ": damaged")), std::string::npos) << line;
        EXPECT_TRUE(fs::is_directory(checkpoints_folder(c.run) + "/" + damaged_name(step, 1)));
      }
      EXPECT_EQ(steps_there(c.run), (std::vector<int64_t>{2, 1}));
      EXPECT_EQ(read_file(checkpoints_folder(c.run) + "/LATEST"), "step-00000002\n");
      EXPECT_EQ(loaded_step(c.run), 2);
      fs::remove_all(c.run);
      save_all(c);  // and once the disk behaves again, all is as ever
      EXPECT_EQ(steps_there(c.run), (std::vector<int64_t>{6, 2}));
      EXPECT_EQ(loaded_step(c.run), 6);
    }
}

// The test of the test: without reading again, nothing that holds is left.
TEST(Reread, IsWhatKeepsThem) {
  MemoryFolder folder("crash-reread");
  const Saves c{.run = folder / "run",
                .last = 5,
                .damage =
                    [](const std::string& checkpoint, int64_t step) {
                      if (step > 2) flip_bit(checkpoint + "/model-00001-of-00002.safetensors", 999);
                    },
                .verify = false};
  EXPECT_EQ(save_all(c).failed, 0);
  EXPECT_EQ(steps_there(c.run), (std::vector<int64_t>{5, 4}));
  EXPECT_EQ(loaded_step(c.run), -1) << "not noticed: saves that nobody reads again";
}

#if !defined(__SANITIZE_ADDRESS__)  // which looks at objects with the help of a pipe
// No descriptor is left when it is to be read again: that fails, but is no damage.
TEST(Reread, LeavesInItsPlaceWhatCannotBeReadForAnotherReason) {
  MemoryFolder folder("crash-reread");
  const std::string run = folder / "run";
  rlimit limit{};
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &limit), 0);
  rlimit few = limit;
  const int next = dup(0);
  close(next);
  few.rlim_cur = rlim_t(next);
  std::vector<std::string> said;
  in_world(RankLayout(1, 1, kStateExperts), [&](ProcessGroups& groups) {
    StateHolder holder(groups);
    SeamFiles files;
    bool published = false;
    files.after = [&](const FileCall& call) {
      if (published && call.what == Call::sync_folder) setrlimit(RLIMIT_NOFILE, &few);
      published = publishes(call);
    };
    Checkpoints checkpoints(files, groups, holder.store,
                            {.writer = {.run = run, .generation = 1, .may_write = {}},
                             .asynchronous = false,
                             .retention = {},
                             .say = [&](const std::string& text) {
                               setrlimit(RLIMIT_NOFILE, &limit);
                               said.push_back(text);
                             }});
    holder.fill(1);
    checkpoints.save(facts_of(1));
    EXPECT_EQ(checkpoints.failed(), 1);
  });
  setrlimit(RLIMIT_NOFILE, &limit);
  ASSERT_EQ(said.size(), 1u);
  EXPECT_NE(said[0].find("it is there, but could not be read again: rank 0: "), std::string::npos)
      << said[0];
  EXPECT_NE(said[0].find("Too many open files"), std::string::npos) << said[0];
  EXPECT_EQ(steps_there(run), (std::vector<int64_t>{1}));
  EXPECT_EQ(loaded_step(run), 1);
}
#endif

// Whichever file it is, and on whatever number of ranks: each reads its own.
TEST(Reread, FindsAnyDamageOfAnyFile) {
  int64_t cases = 0;
  for (auto [ranks, expert] : {std::pair{1, 1}, {2, 1}, {2, 2}, {3, 3}}) {
    MemoryFolder folder("crash-reread");
    std::vector<std::string> names;
    Saves c{.run = folder / "run", .last = 1, .ranks = ranks, .expert = expert};
    save_all(c);
    for (const auto& entry : fs::directory_iterator(list_checkpoints(c.run).front().path))
      names.push_back(entry.path().filename());
    EXPECT_EQ(int(names.size()), 3 * ranks + 2);
    for (const std::string& name : names)
      for (const char* how : {"first bit", "last bit", "shorter", "longer", "gone"}) {
        SCOPED_TRACE(concat(name, ": ", how, ", ", ranks, " ranks"));
        fs::remove_all(c.run);
        c.last = 2;
        c.damage = [&](const std::string& checkpoint, int64_t step) {
          const std::string path = join_path(checkpoint, name), what = how;
          const auto bytes = int64_t(fs::file_size(path));
          if (step < 2) return;
          if (what == "first bit") flip_bit(path, 0);
          if (what == "last bit") flip_bit(path, bytes * 8 - 1);
          if (what == "shorter") fs::resize_file(path, uintmax_t(bytes - 1));
          if (what == "longer") fs::resize_file(path, uintmax_t(bytes + 1));
          if (what == "gone") fs::remove(path);
        };
        const Saved saved = save_all(c);
        EXPECT_EQ(saved.failed, 1);
        EXPECT_NE(saved.said[1].find(name), std::string::npos) << saved.said[1];
        EXPECT_EQ(steps_there(c.run), std::vector<int64_t>{1});
        ++cases;
      }
  }
  report_cases("damages of one file found by reading again", cases);
}

// Of what it finds a stale owner moves and deletes nothing: its successor may need it.
TEST(Reread, LeavesAllToASuccessor) {
  MemoryFolder folder("crash-reread");
  std::atomic<bool> ours = true;
  const Saves c{.run = folder / "run",
                .last = 3,
                .damage =
                    [&](const std::string& checkpoint, int64_t step) {
                      if (step < 3) return;
                      flip_bit(checkpoint + "/model-00001-of-00002.safetensors", 999);
                      ours = false;
                    },
                .may_write = [&] { return ours.load(); }};
  const Saved saved = save_all(c);
  EXPECT_EQ(saved.failed, 1);
  EXPECT_NE(saved.said.back().find("another launch has taken over"), std::string::npos)
      << saved.said.back();
  EXPECT_EQ(steps_there(c.run), (std::vector<int64_t>{3, 2, 1}));
}

// An owner that stands still amid its clean-up, at call `at` of it, and has a successor when it
// goes on: what that one has seen is still there, whole. Returns whether there was such a call.
bool stale_amid_its_clean_up(int64_t at, bool renames_new, int64_t& given_back) {
  MemoryFolder folder("crash-reread");
  const std::string run = folder / "run", all = checkpoints_folder(run);
  for (int64_t step : {1, 2, 3, 4}) EXPECT_EQ(save({.run = run, .step = step})[0], "");
  // Step 5, too, as a stale owner has left it when it published by links.
  const std::string half = join_path(all, checkpoint_name(5)),
                    attempt = join_path(all, attempt_name(5, 1, 7));
  EXPECT_EQ(save({.run = run, .step = 5})[0], "");
  fs::create_directory(attempt);
  const std::string manifest = join_path(half, kManifestName), content = read_file(manifest);
  fs::remove(manifest);
  bool ours = true;
  std::vector<CheckpointPlace> seen;
  std::string last;
  int64_t calls = 0;
  SeamFiles files;
  files.renames_new = renames_new;
  files.before = [&](FileCall& call) {
    if (calls++ != at) return true;
    ours = false;
    last = call.path;
    // Between two looks at it the half becomes a checkpoint: the successor's, of the same step.
    if (call.path == half) std::ofstream(manifest, std::ios::binary) << content;
    seen = list_checkpoints(run);
    return true;
  };
  std::string why;
  try {
    collect_garbage(files, run, 1, {.keep_last = 1}, [&] { return ours; });
  } catch (const Error& error) {
    why = error.what();
  }
  if (ours) return false;
  for (const CheckpointPlace& place : seen) {
    EXPECT_TRUE(file_exists(place.path)) << "deleted at " << last << ": " << place.path;
    if (!file_exists(place.path) || is_half_published(run, place.step)) continue;
    EXPECT_NO_THROW(Checkpoint(place.path).verify_files()) << place.path;
  }
  given_back +=
      why.find("is not deleted: another launch has taken over this run") != std::string::npos;
  return true;
}

TEST(CleaningUp, ByAStaleOwnerLeavesWhatItsSuccessorHasSeen) {
  for (bool renames_new : {true, false}) {
    int64_t cases = 0, given_back = 0;
    for (int64_t at = 0; at < 300 && !HasFailure(); ++at, ++cases) {
      SCOPED_TRACE(concat("call ", at, renames_new ? "" : ", by links"));
      if (!stale_amid_its_clean_up(at, renames_new, given_back)) break;
    }
    EXPECT_GT(cases, 30);
    EXPECT_GT(given_back, 2);
    report_cases(concat("P17 owners that went stale amid their clean-up",
                        renames_new ? "" : ", without such a rename"),
                 cases);
  }
}

// The loader has set the same step aside under this generation: the name is taken.
TEST(Reread, SetsAsideASecondTime) {
  MemoryFolder folder("crash-reread");
  Saves c{.run = folder / "run", .last = 1, .damage = [](const std::string& checkpoint, int64_t) {
            flip_bit(checkpoint + "/model-00001-of-00002.safetensors", 999);
          }};
  for (int times = 1; times <= 3; ++times) {
    EXPECT_EQ(save_all(c).failed, 1);
    int damaged = 0;
    for (const auto& entry : fs::directory_iterator(checkpoints_folder(c.run)))
      damaged += kind_of_name(entry.path().filename()) == NameKind::damaged;
    EXPECT_EQ(damaged, times);
  }
}

// What became of a save is said between the next steps, not when the next save begins, and by rank
// 0 alone: no rank waits for another.
TEST(Announcement, OfASaveComesAsSoonAsItHasEnded) {
  for (const bool fails : {false, true}) {
    MemoryFolder folder("crash-reread");
    std::vector<std::string> said;
    in_world(RankLayout(2, 2, kStateExperts), [&](ProcessGroups& groups) {
      StateHolder holder(groups);
      SeamFiles files;
      files.before = [&](FileCall& call) {
        check(!fails, call.path, ": no space left (injected)");
        return true;
      };
      Checkpoints checkpoints(files, groups, holder.store,
                              {.writer = {.run = folder / "run", .generation = 1, .may_write = {}},
                               .retention = {},
                               .say = [&](const std::string& text) { said.push_back(text); }});
      checkpoints.announce();
      holder.fill(1);
      checkpoints.save(facts_of(1));
      const auto start = std::chrono::steady_clock::now();
      while (groups.rank == 0 && said.empty() &&
             std::chrono::steady_clock::now() - start < std::chrono::seconds(60)) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        checkpoints.announce();
      }
      EXPECT_TRUE(groups.rank != 0 || said.size() == 1);
      EXPECT_EQ(checkpoints.failed(), fails && groups.rank == 0);
      checkpoints.announce();
      checkpoints.finish();
      EXPECT_EQ(checkpoints.failed(), fails);
    });
    ASSERT_EQ(said.size(), 1u) << "said twice";
    EXPECT_EQ(said[0].rfind(fails ? "NOT saved" : "saved", 0), 0u) << said[0];
  }
}

// The step loop asks: the line of a save stands before the step after which it had long ended.
TEST(Announcement, OfASaveStandsBeforeTheNextStep) {
  TemporaryFolder folder;
  TrainRequest request = request_of(
      SmallRun{.folder = folder / "run", .ranks = 2, .expert = 2, .steps = 6, .save_interval = 2});
  request.train.set_progress(TrainConfig::AUTO);
  request.train.set_log_interval(1);
  const std::string latest = checkpoints_folder(request.run) + "/LATEST";
  testing::internal::CaptureStderr();
  in_world(RankLayout(2, 2, int(request.model.experts())), [&](ProcessGroups& groups) {
    TrainRequest own = request;
    own.stop_wanted = [&, step = 0]() mutable {
      // The third step begins when the save after the second has come to its very end.
      for (int i = 0; ++i < 6000 && step == 2 && !file_exists(latest);)
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
      if (step++ == 2) std::this_thread::sleep_for(std::chrono::milliseconds(200));
      return false;
    };
    PosixFileSystem files;
    run_training(files, groups, own);
  });
  const std::string said = testing::internal::GetCapturedStderr();
  const size_t saved = said.find("saved      step-00000002"), step = said.find("step 3/6 ");
  ASSERT_NE(saved, std::string::npos) << said;
  ASSERT_NE(step, std::string::npos) << said;
  EXPECT_LT(saved, step) << said;
  EXPECT_EQ(said.find("saved      step-00000002", saved + 1), std::string::npos) << said;
}

// Failed saves are counted in metrics.jsonl from the step on whose end they were known.
TEST(Announcement, OfFailedSavesIsInTheMetrics) {
  for (const bool asynchronous : {false, true}) {
    TemporaryFolder folder;
    SeamFiles files;
    files.before = [&](FileCall& call) {
      check(call.path.find("step-00000002.tmp-") == std::string::npos, "no space left (injected)");
      return true;
    };
    testing::internal::CaptureStderr();  // where it is said though there is no progress line
    launch({.folder = folder / "run",
            .ranks = 2,
            .steps = 6,
            .save_interval = 2,
            .asynchronous = asynchronous,
            .files = &files});
    const std::string said = testing::internal::GetCapturedStderr();
    EXPECT_NE(said.find("moemamba: NOT saved  after step 2: "), std::string::npos) << said;
    const std::vector<std::string> lines = steps_of(folder / "run");
    ASSERT_EQ(lines.size(), 6u);
    EXPECT_EQ(lines[1].find("failed_saves"), std::string::npos) << lines[1];
    for (size_t step : {4, 5})
      EXPECT_NE(lines[step].find("\"failed_saves\":1"), std::string::npos) << lines[step];
  }
}

}  // namespace
}  // namespace moemamba
