// A training run around its saves: what it needs for them, what it says when they fail, and what it
// does with what they have left.
#include <gtest/gtest.h>

#include <filesystem>
#include <mutex>

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

}  // namespace
}  // namespace moemamba
