// A training run around its saves: what it needs for them, what it says when they fail, and what it
// does with what they have left.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <map>

#include "runtime/token_files.h"
#include "runtime/tokenizer.h"
#include "tests/support/seam_files.h"
#include "tests/support/small_run.h"
#include "tests/support/temporary_folder.h"

namespace moemamba {
namespace {

namespace fs = std::filesystem;

TEST(ASave, NeedsNoFileOfTheTokenizer) {
  TemporaryFolder folder;
  PosixFileSystem disk;
  std::string text;
  for (int i = 0; i < 60; ++i) text += concat("The cat number ", i, " sat down upon a mat.\n");
  const Tokenizer bpe = Tokenizer::train_bpe(std::vector<std::string>{text}, 300);
  bpe.save(disk, folder / "tokenizer.model");
  TokenWriter writer(disk, folder / "tokens", TokenFormat::megatron, bpe.vocabulary());
  std::vector<int32_t> ids = bpe.encode(text);
  ids.push_back(bpe.end_of_document());
  writer.add_document(ids);
  writer.commit();
  const std::string data =
      concat("train: '", folder / "tokens", "' tokenizer: '", folder / "tokenizer.model", "'");
  SmallRun run{.folder = folder / "run", .steps = 4, .save_interval = 2, .data = data.c_str()};
  run.before_step = [&](int, int64_t step) {
    if (step == 1) fs::remove(run.folder + "/tokenizer.model");
  };
  launch(run);
  EXPECT_EQ(newest_manifest(run.folder).step(), 4);
  const std::string kept = list_checkpoints(run.folder).front().path + "/tokenizer.model";
  EXPECT_EQ(read_file(kept), bpe.content());
}

// Or a power cut may take the first run of a fresh checkout with all its checkpoints.
TEST(ANewRun, SyncsEveryFolderThatGotANewOne) {
  TemporaryFolder folder;
  SeamFiles files;
  std::vector<std::string> synced;
  files.before = [&](FileCall& call) {
    if (call.what == Call::sync_folder) synced.push_back(call.path);
    return true;
  };
  const SmallRun run{.folder = folder / "runs/of/mine", .steps = 1, .files = &files};
  launch(run);
  for (const std::string& above : {folder.path(), folder / "runs", folder / "runs/of"})
    EXPECT_GE(std::ranges::count(synced, above), 1) << above;
  synced.clear();
  launch({.folder = folder / "runs/of/others", .steps = 1, .files = &files});
  EXPECT_EQ(std::ranges::count(synced, folder / "runs"), 0) << "it was there before";
  EXPECT_GE(std::ranges::count(synced, folder / "runs/of"), 1);
}

// As they are where a save was read again, did not hold, and the rank died before the next one.
TEST(ARun, OfWhichOnlyDamagedCheckpointsAreLeftIsNotBegunAnew) {
  TemporaryFolder folder;
  SmallRun run{.folder = folder / "run", .ranks = 2, .steps = 8, .save_interval = 2};
  run.launch_steps = 4;
  launch(run);
  run.launch_steps = 0;
  fs::remove_all(run.folder + "/weights");
  const std::string all = checkpoints_folder(run.folder);
  for (int64_t step : {2, 4})
    fs::rename(join_path(all, checkpoint_name(step)), join_path(all, damaged_name(step, 3)));
  const std::vector<std::string> steps = steps_of(run.folder);
  const std::string why = message_of([&] { launch(run); });
  EXPECT_NE(why.find("already holds a run"), std::string::npos) << why;
  EXPECT_NE(why.find("the newest is checkpoints/step-00000004.damaged-3"), std::string::npos)
      << why;
  EXPECT_EQ(steps_of(run.folder), steps) << "the run was begun anew";
  EXPECT_FALSE(file_exists(run.folder + "/weights"));
  fs::rename(join_path(all, damaged_name(2, 3)), join_path(all, checkpoint_name(2)));
  launch(run);
  EXPECT_EQ(newest_manifest(run.folder).step(), 8);
}

// Without reading saves again, what was read whole is what a roll-back has loaded.
TEST(ARollBack, MakesItsCheckpointTheOneThatStays) {
  TemporaryFolder folder;
  SmallRun run{.folder = folder / "run", .ranks = 2, .steps = 8, .save_interval = 2};
  run.keep_last = 1;
  run.launch_steps = 2;
  launch(run);  // which the next launch begins from
  run.launch_steps = 0;
  run.change = [](int, TrainRequest& request) { request.checkpoint.set_verify(false); };
  std::atomic<int> bad = 2;  // the step, and its replay
  run.spoil = [&](int rank, int64_t step) { return rank == 1 && step == 4 && bad-- > 0; };
  launch(run);
  std::vector<int64_t> steps;
  for (const CheckpointPlace& place : list_checkpoints(run.folder)) steps.push_back(place.step);
  EXPECT_EQ(steps, (std::vector<int64_t>{8, 4}));
}

// A disk that refuses attempts to save these steps, each so many times.
class RefusesAttempts : public SeamFiles {
 public:
  RefusesAttempts(int64_t step, int times) : RefusesAttempts(std::map{std::pair(step, times)}) {}
  explicit RefusesAttempts(std::map<int64_t, int> times) : times_(std::move(times)) {
    before = [this](FileCall& call) {
      if (call.what != Call::make_folder) return true;
      for (auto& [step, left] : times_)
        check(call.path.find(checkpoint_name(step) + ".tmp-") == std::string::npos || left-- <= 0,
              call.path, ": no space left (injected)");
      return true;
    };
  }

 private:
  std::map<int64_t, int> times_;  // only rank 0 makes folders of attempts, one after the other
};

std::string error_of(const SmallRun& run, std::string& said) {
  std::string error;
  testing::internal::CaptureStderr();
  try {
    launch(run);
  } catch (const Error& thrown) {
    error = thrown.what();
  }
  said = testing::internal::GetCapturedStderr();
  return error;
}

// Of a run's end, and of one that is asked to stop.
TEST(TheLastSave, IsTriedOnceMoreWhenItFails) {
  for (int64_t end : {6, 4})
    for (bool asynchronous : {true, false}) {
      TemporaryFolder folder;
      RefusesAttempts disk(end, 1);
      const SmallRun run{.folder = folder / "run",
                         .ranks = 2,
                         .steps = 6,
                         .asynchronous = asynchronous,
                         .launch_steps = end < 6 ? end : 0,
                         .files = &disk};
      std::string said;
      EXPECT_EQ(error_of(run, said), "");
      EXPECT_NE(said.find(concat("NOT saved  after step ", end)), std::string::npos) << said;
      EXPECT_EQ(newest_manifest(run.folder).step(), end);
    }
}

TEST(TheLastSave, ThatFailsTwiceIsSaidWithTheStepFromWhichTheRunGoesOn) {
  TemporaryFolder folder;
  SmallRun whole{.folder = folder / "whole", .ranks = 2, .steps = 6, .save_interval = 2};
  launch(whole);
  for (int64_t end : {6, 5, 4}) {
    SCOPED_TRACE(concat("at step ", end));
    RefusesAttempts disk(end, 2);
    SmallRun run = whole;
    run.folder = folder / concat("run", end);
    run.launch_steps = end < 6 ? end : 0;
    run.files = &disk;
    const int64_t before = end > 4 ? 4 : 2;
    std::string said;
    const std::string error = error_of(run, said);
    const std::string& told = end == 6 ? error : said;
    EXPECT_NE(told.find(concat("step ", end, " of 6 could not be saved, twice: ")),
              std::string::npos)
        << told;
    EXPECT_NE(
        told.find(concat("the same command goes on after step ", before, end == 6 ? "" : ";")),
        std::string::npos)
        << told;
    EXPECT_EQ(error.empty(), end < 6) << error;
    EXPECT_EQ(newest_manifest(run.folder).step(), before);
    run.launch_steps = 0;
    run.files = nullptr;
    launch(run);
    EXPECT_EQ(steps_of(run.folder), steps_of(whole.folder));
    EXPECT_EQ(newest_manifest(run.folder).state_hash(), newest_manifest(whole.folder).state_hash());
  }
}

// Saves that may fail in a row are those that training goes on behind.
TEST(TheLastSave, IsTriedTwiceAndLeavesWeightsWhateverMaxFailedSavesIs) {
  struct Case {
    int64_t max_failed, end, failed_before;
    bool asynchronous;
  };
  for (const Case& c :
       {Case{1, 6, -1, true}, Case{1, 6, -1, false}, Case{2, 6, -1, true}, Case{3, 6, 4, true},
        Case{3, 6, 4, false}, Case{1, 6, 4, true}, Case{1, 5, -1, true}, Case{1, 5, 4, true}}) {
    SCOPED_TRACE(concat(c.max_failed, " at step ", c.end, ", ", c.failed_before));
    TemporaryFolder folder;
    RefusesAttempts disk({{c.end, 2}, {c.failed_before, 1}});
    SmallRun run{.folder = folder / "run", .ranks = 2, .steps = 6, .save_interval = 2};
    run.asynchronous = c.asynchronous;
    run.launch_steps = c.end < 6 ? c.end : 0;
    run.files = &disk;
    run.change = [&](int, TrainRequest& request) {
      request.checkpoint.set_max_failed_saves(c.max_failed);
    };
    std::string said;
    const std::string error = error_of(run, said);
    const int64_t before = c.failed_before < 0 ? 4 : 2;
    const std::string& told = c.end == 6 ? error : said;
    EXPECT_NE(told.find(concat("step ", c.end, " of 6 could not be saved, twice: ")),
              std::string::npos)
        << error << said;
    EXPECT_NE(told.find(concat("the same command goes on after step ", before)), std::string::npos)
        << error << said;
    EXPECT_TRUE(file_exists(run.folder + "/weights/model.safetensors"));
    EXPECT_EQ(newest_manifest(run.folder).step(), before);
  }
}

// What the disk does to the first attempt at a last save, once it has its name.
enum class Blow : uint8_t {
  no_sync,     // of the folder it is in
  unreadable,  // is one of its files for now
  damage,      // which is found, and then it cannot be renamed
  another      // of that name and of another generation was there before
};

class HitsTheFirst : public SeamFiles {
 public:
  HitsTheFirst(const std::string& run, int64_t step, Blow blow)
      : place_(join_path(checkpoints_folder(run), checkpoint_name(step))),
        file_(place_ + "/model-00001-of-00002.safetensors") {
    before = [this, blow](FileCall& call) {
      const bool syncs = call.what == Call::sync_folder && named_;
      check(blow != Blow::no_sync || !syncs || hits_-- <= 0, call.path, ": no sync (injected)");
      const bool moves = call.what == Call::rename && call.path == place_;
      check(blow != Blow::damage || !moves || hits_-- <= 0, call.path, ": no rename (injected)");
      return true;
    };
    after = [this, blow](const FileCall& call) {
      if (call.what != Call::rename_new || call.to != place_) return;
      if (named_.exchange(true)) return;
      if (blow == Blow::damage) fs::resize_file(file_, 9);
      if (blow == Blow::unreadable) lock();
    };
  }
  ~HitsTheFirst() override { unlock(); }
  void unlock() {
    if (const int held = held_.exchange(-1); held >= 0) close(held);
  }

 private:
  // Who opens a file under such a lease is told to come again.
  void lock() {
    signal(SIGIO, SIG_IGN);
    held_ = ::open(file_.c_str(), O_RDONLY | O_CLOEXEC);
    EXPECT_EQ(fcntl(held_, F_SETLEASE, F_WRLCK), 0) << "this disk has no leases";
  }

  std::string place_, file_;
  std::atomic<int> hits_ = 1, held_ = -1;
  std::atomic<bool> named_ = false;
};

// It is read again first, and only what does not hold is saved anew.
TEST(TheLastSave, ThatIsThereAlthoughItFailedIsTakenOrMadeWay) {
  TemporaryFolder folder;
  SmallRun whole{.folder = folder / "whole", .ranks = 2, .steps = 6, .save_interval = 2};
  launch(whole);
  for (int64_t end : {6, 5})
    for (Blow blow : {Blow::no_sync, Blow::unreadable, Blow::damage, Blow::another}) {
      SCOPED_TRACE(concat(int(blow), " at step ", end));
      SmallRun run = whole;
      run.folder = folder / concat("run", end, "-", int(blow));
      run.launch_steps = end < 6 ? end : 0;
      HitsTheFirst disk(run.folder, end, blow);
      run.files = &disk;
      run.on_event = [&](const RunEvent& event) {
        if (event.kind() == "save_failed") disk.unlock();
      };
      const std::string place = join_path(checkpoints_folder(run.folder), checkpoint_name(end));
      run.before_step = [&](int rank, int64_t step) {
        if (blow == Blow::another && rank == 0 && step == 3)
          copy_tree(list_checkpoints(whole.folder).front().path, place);
      };
      std::string said;
      EXPECT_EQ(error_of(run, said), "");
      EXPECT_NE(said.find(concat("NOT saved  after step ", end)), std::string::npos) << said;
      EXPECT_EQ(newest_manifest(run.folder).step(), end) << said;
      const bool anew = blow == Blow::damage || blow == Blow::another;
      EXPECT_EQ(list_damaged(run.folder).size(), anew ? 1u : 0u) << said;
      run = {.folder = run.folder, .ranks = 2, .steps = 6, .save_interval = 2};
      if (end < 6) launch(run);
      EXPECT_EQ(steps_of(run.folder), steps_of(whole.folder));
      EXPECT_EQ(newest_manifest(run.folder).state_hash(),
                newest_manifest(whole.folder).state_hash());
    }
}

// As long as nobody can read it, it may be whole: it keeps its name, and the words say so.
TEST(TheLastSave, ThatCannotBeReadStaysAndIsSaid) {
  TemporaryFolder folder;
  SmallRun run{.folder = folder / "run", .ranks = 2, .steps = 6, .save_interval = 2};
  run.launch_steps = 5;
  HitsTheFirst disk(run.folder, 5, Blow::unreadable);
  run.files = &disk;
  std::string said;
  EXPECT_EQ(error_of(run, said), "");
  EXPECT_NE(said.find("step 5 of 6: it is there, but could not be read again: "), std::string::npos)
      << said;
  EXPECT_NE(said.find("the same command goes on with it once it can be read"), std::string::npos)
      << said;
  EXPECT_TRUE(file_exists(run.folder + "/weights/model.safetensors"));
  disk.unlock();
  EXPECT_EQ(newest_manifest(run.folder).step(), 5);
}

// Then the weights are all that there is.
TEST(TheLastSave, ThatFailsTwiceWithoutAnEarlierOneEndsTheRunWithAnError) {
  TemporaryFolder folder;
  RefusesAttempts disk(6, 2);
  const SmallRun run{.folder = folder / "run", .steps = 6, .files = &disk};
  std::string said;
  const std::string error = error_of(run, said);
  EXPECT_NE(error.find(concat("--init-from=", run.folder, "/weights")), std::string::npos) << error;
  EXPECT_TRUE(file_exists(run.folder + "/weights/model.safetensors"));
}

// A run that has weights and no checkpoint is never begun anew, and whoever asked it to stop may
// start it again unseen.
TEST(TheLastSave, ThatFailsTwiceWithoutAnEarlierOneLetsAStoppedRunBeginAnew) {
  TemporaryFolder folder;
  RefusesAttempts disk(4, 2);
  SmallRun run{.folder = folder / "run", .ranks = 2, .steps = 6, .launch_steps = 4};
  run.files = &disk;
  std::string said;
  const std::string error = error_of(run, said);
  EXPECT_NE(error.find("step 4 of 6 could not be saved, twice: "), std::string::npos) << error;
  EXPECT_NE(error.find("the same command begins anew"), std::string::npos) << error;
  EXPECT_FALSE(file_exists(run.folder + "/weights"));
  run.launch_steps = 0;
  launch(run);
  EXPECT_EQ(steps_of(run.folder).size(), 6u);
  EXPECT_EQ(newest_manifest(run.folder).step(), 6);
}

}  // namespace
}  // namespace moemamba
