// Going on with a run as users do it: folders that hold another run, other formats, and a
// checkpoint of every format that there ever was.
#include <signal.h>

#include <filesystem>
#include <fstream>

#include "runtime/checkpoint_parts.h"
#include "runtime/state_hash.h"
#include "runtime/weights.h"
#include "tests/support/checkpoint_cases.h"
#include "tests/support/in_world.h"
#include "tests/support/program.h"
#include "tests/support/small_run.h"

namespace moemamba {
namespace {

namespace fs = std::filesystem;

class Resume : public ProgramTest {
 protected:
  PosixFileSystem plain_disk_;
  std::string copy_golden(const std::string& format) const {
    const std::string golden = MOEMAMBA_SOURCE_DIR "/tests/golden_checkpoints/format-" + format;
    fs::create_directories(checkpoints_folder(run()));
    fs::copy(golden + "/step-00000003", checkpoints_folder(run()) + "/step-00000003");
    return golden;
  }
};

TEST_F(Resume, AnotherRunIsRefusedByItsSettings) {
  const std::string train = "$moemamba train" + small_training(4);
  ASSERT_EQ(shell(train).code, 0);
  const auto before = tree_of(run());
  const std::pair<const char*, const char*> others[] = {
      {"--model.experts=3", "model.experts: 2 there, 3 here"},
      {"--model.width=24", "model.width: 16 there, 24 here"},
      {"--train.seed=7", "train.seed: 42 there, 7 here"},
      {"--train.global_batch_size=8", "train.global_batch_size: 4 there, 8 here"},
      {"--train.sequence_length=8", "train.sequence_length: 16 there, 8 here"},
      {"--data.sampling=CIRCULAR", "data.sampling: EPOCHS there, CIRCULAR here"}};
  for (const auto& [option, text] : others)
    for (const std::string steps : {"", " --train.steps=9"}) {
      const Result result = shell(train + option + steps);
      EXPECT_EQ(result.code, 1) << result.err;
      EXPECT_EQ(count(result.err, "already holds a run; choose another --run or set "), 1)
          << result.err;
      EXPECT_EQ(count(result.err, text), 1) << text << " in\n" << result.err;
    }
  Result result = shell(train + "--fresh --train.steps=9");
  EXPECT_EQ(result.code, 1) << result.err;
  EXPECT_EQ(count(result.err, "--fresh wants an empty folder"), 1) << result.err;
  EXPECT_TRUE(tree_of(run()) == before) << "something was touched";
  result = shell(train + "--train.steps=6");
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(count(result.err, "train.steps: 4 there, 6 here"), 1) << result.err;
  EXPECT_EQ(numbers_of(read_file(run() + "/metrics.jsonl"), "step"),
            (std::vector<double>{0, 1, 2, 3, 4, 5}));
  result = shell("$moemamba train --fresh --run=new" + small_training(2) + "--run=new");
  EXPECT_EQ(result.code, 0) << result.err;
}

// Whole, and from elsewhere in time: it is neither read nor taken for a damaged one.
TEST_F(Resume, AnotherFormatIsRefusedAndLeftAlone) {
  const std::string train = "$moemamba train" + small_training(4) + "--train.save_interval=2 ";
  ASSERT_EQ(shell(train).code, 0);
  const std::string place = list_checkpoints(run()).front().path + "/" + kManifestName;
  const std::string content = read_file(place);
  CheckpointManifest manifest = whole_manifest(content);
  for (const auto& [format, text] :
       {std::pair(2,
                  "MANIFEST.pb: written in format 2, this program reads up to 1; take a newer "
                  "moemamba"),
        {0, "MANIFEST.pb: written in format 0, this program reads 1 to 1"}}) {
    manifest.set_format(format);
    put("run/checkpoints/step-00000004/MANIFEST.pb", seal(manifest));
    const auto before = tree_of(checkpoints_folder(run()));
    const Result result = shell(train + "--train.steps=6");
    EXPECT_EQ(result.code, 1) << result.err;
    EXPECT_EQ(count(result.err, text), 1) << result.err;
    EXPECT_TRUE(tree_of(checkpoints_folder(run())) == before);
  }
  put("run/checkpoints/step-00000004/MANIFEST.pb", content);
  EXPECT_EQ(shell(train + "--train.steps=6").code, 0);
}

// Nothing may ever make these unreadable: an older format goes when this program's is two further.
TEST_F(Resume, TheCheckpointOfEveryFormatIsRead) {
  const std::string folder = copy_golden("1"), place = list_checkpoints(run()).front().path;
  const std::string expected = read_file(folder + "/expected.txt");
  const auto value_of = [&](const std::string& name) {
    const size_t at = expected.find("\n" + name + ": ") + name.size() + 3;
    return expected.substr(at, expected.find('\n', at) - at);
  };
  const Checkpoint checkpoint(place);
  checkpoint.verify_files();
  const CheckpointManifest& manifest = checkpoint.manifest().facts();
  EXPECT_EQ(manifest.format(), 1);
  EXPECT_EQ(state_hash_text(hash_of_files(place)), value_of("state hash"));
  EXPECT_EQ(state_hash_text(manifest.state_hash()), value_of("state hash"));
  EXPECT_EQ(manifest.chain(), value_of("chain"));
  EXPECT_EQ(std::to_string(manifest.next_sample()), value_of("next sample"));
  // And gone on with: its own settings, two more steps.
  put("run/config.textproto", manifest.config());
  put("settings.textproto", manifest.config());
  small_training(1);  // its text
  const Result result = shell(
      "$moemamba train --config settings.textproto --run=run --train.steps=5 "
      "--parallel.expert=1 --data.train=tokens/train");
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(count(result.err, "resumed    run/checkpoints/step-00000003"), 1) << result.err;
  EXPECT_EQ(newest_manifest(run()).step(), 5);
}

// Stopped, gone on with, killed: the weights of the stop are there, and older than the checkpoints.
TEST_F(Resume, WhatUsesARunTakesItsNewestWeightsAndSaysWhich) {
  const std::string train = "$moemamba train --train.save_interval=2";
  ASSERT_EQ(shell(train + small_training(4)).code, 0);
  const auto expect_taken = [&](const std::string& taken) {
    for (const char* ranks : {"", " --ranks 2"})
      for (const char* use :
           {"evaluate --data.validation=tokens/validation", "generate --prompt The --tokens 20"}) {
        const std::string words = std::string("$moemamba ") + use + ranks + " --run run";
        const Result result = shell(words);
        EXPECT_EQ(result.code, 0) << result.err;
        EXPECT_EQ(count(result.err, "weights    " + taken + "\n"), 1) << words << result.err;
        const std::string path = taken.substr(0, taken.find(','));
        EXPECT_EQ(shell(words + " --weights " + path).out, result.out) << words;
      }
  };
  expect_taken("run/weights, of step 4");
  const Result killed =
      shell(train + small_training(1'000'000'000) +
            "& id=$!; until [ \"$(wc -l <run/metrics.jsonl)\" -ge 12 ]; do sleep 0.02; done; "
            "kill -9 $id; wait $id");
  EXPECT_EQ(killed.code, 128 + SIGKILL);
  fence_attempts(plain_disk_, run(), 99);  // as the next launch would
  const auto places = list_checkpoints(run());
  ASSERT_GE(places.size(), 2u);
  const auto text = [](const CheckpointPlace& place) {
    return "run/checkpoints/" + checkpoint_name(place.step) + ", of step " +
           std::to_string(place.step);
  };
  expect_taken(text(places[0]));
  const Result begun = shell("$moemamba train --init-from=run" + small_training(1) + "--run=other");
  EXPECT_EQ(begun.code, 0) << begun.err;
  EXPECT_EQ(count(begun.err, "weights    " + text(places[0]) + "\n"), 1) << begun.err;
  // One that is damaged is passed over, were it by one bit; where all are, the weights are left.
  const std::string shard = places[0].path + "/model-00001-of-00001.safetensors";
  flip_bit(shard, int64_t(fs::file_size(shard)) * 8 - 1);
  expect_taken(text(places[1]));
  for (const char* use : {"train --init-from=", "generate --run run --weights "}) {
    const std::string path = "run/checkpoints/" + checkpoint_name(places[0].step);
    const Result refused =
        shell("$moemamba " + (use + path) +
              (use[0] == 't' ? small_training(1) + "--run=third" : std::string()));
    EXPECT_EQ(refused.code, 1) << refused.err;
    EXPECT_GE(count(refused.err, path + "/model-00001-of-00001.safetensors: damaged: "), 1)
        << refused.err;
  }
  fs::remove(places[0].path + "/" + kManifestName);
  expect_taken(text(places[1]));
  for (const CheckpointPlace& place : places) fs::resize_file(place.path + "/" + kIndexName, 1);
  expect_taken("run/weights, of step 4");
  fs::remove_all(run() + "/weights");
  const Result none = shell("$moemamba generate --ranks 2 --run run");
  EXPECT_EQ(none.code, 1) << none.err;
  EXPECT_GE(count(none.err, "run: none of its checkpoints can be used: "), 1) << none.err;
}

// As those of a run that goes on: a large one's would keep rank 0 busy for hours.
TEST(WeightsForUse, AreReadByAllRanksEachItsShareOfTheFiles) {
  TemporaryFolder folder;
  const SmallRun run{.folder = folder / "run", .ranks = 2, .steps = 4, .save_interval = 2};
  launch(run);
  fs::remove_all(run.folder + "/weights");
  const auto places = list_checkpoints(run.folder);
  const Manifest manifest = Checkpoint(places[0].path).manifest();
  ASSERT_GE(manifest.files_size(), 6);
  constexpr int kRanks = 3;
  const auto find = [&](const std::string& path) {  // what each rank finds, or its Error
    std::vector<std::string> found(kRanks);
    in_world(RankLayout(kRanks, 1, 3), [&](ProcessGroups& groups) {
      Stream stream = Stream::immediate();
      std::string& own = found[size_t(groups.rank)];
      try {
        own = find_weights(path, groups, stream).path;
      } catch (const Error& error) {
        own = error.what();
      }
    });
    return found;
  };
  EXPECT_EQ(find(run.folder), std::vector<std::string>(kRanks, places[0].path));
  for (int i = 0; i < manifest.files_size(); ++i) {
    const std::string file = join_path(places[0].path, std::string(manifest.files(i).name()));
    const std::string content = read_file(file);
    flip_bit(file, 99);
    for (const std::string& error : find(places[0].path))
      EXPECT_EQ(error.find(concat("rank ", i % kRanks, ": ", file, ": damaged: ")), 0u) << error;
    EXPECT_EQ(find(run.folder), std::vector<std::string>(kRanks, places[1].path));
    std::ofstream(file, std::ios::binary) << content;
  }
  fs::remove_all(places[1].path);
  const std::string file = join_path(places[0].path, std::string(manifest.files(1).name()));
  const std::string none = run.folder + ": none of its checkpoints can be used: ";
  flip_bit(file, 99);
  for (const std::string& error : find(run.folder))
    EXPECT_EQ(error.find(concat(none, "rank 1: ", file, ": damaged: ")), 0u) << error;
  fs::remove(file);
  for (const std::string& error : find(run.folder))
    EXPECT_EQ(error.find(concat(none, file, ": ")), 0u) << error;
}

// The same words start it again, whatever has become of the other run since.
TEST(ARunFromOthersWeights, DoesNotNeedThemOnceItHasACheckpointOfItsOwn) {
  TemporaryFolder folder;
  const SmallRun other{.folder = folder / "other", .ranks = 2, .steps = 2};
  launch(other);
  const std::string from = list_checkpoints(other.folder).front().path;
  SmallRun run{.folder = folder / "run", .ranks = 2, .steps = 6, .save_interval = 2};
  run.change = [&](int, TrainRequest& request) { request.init_from = from; };
  SmallRun whole = run;
  whole.folder = folder / "whole";
  launch(whole);
  run.launch_steps = 3;
  launch(run);
  run.launch_steps = 0;
  flip_bit(from + "/model-00001-of-00002.safetensors", 999);
  launch(run);
  EXPECT_EQ(steps_of(run.folder), steps_of(whole.folder));
  EXPECT_EQ(newest_manifest(run.folder).state_hash(), newest_manifest(whole.folder).state_hash());
  run.change = [&](int, TrainRequest& request) {
    request.init_from = from;
    request.overwrite = true;
  };
  EXPECT_NE(message_of([&] { launch(run); }).find(": damaged: "), std::string::npos);
}

}  // namespace
}  // namespace moemamba
