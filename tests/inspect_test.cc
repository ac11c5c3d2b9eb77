// moemamba inspect, as a user runs it: each sub-command on good and on bad checkpoints.
#include <signal.h>
#include <sys/wait.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <thread>

#include "core/file.h"
#include "runtime/checkpoint_reader.h"
#include "tests/support/program.h"

namespace moemamba {
namespace {

namespace fs = std::filesystem;

class Inspect : public ProgramTest {
 protected:
  // A run on two ranks with checkpoints of steps 2, 4 and 6.
  void train(const std::string& words = "--parallel.expert=2") {
    const Result result = shell("$moemamba train --ranks 2 " + training() + words);
    ASSERT_EQ(result.code, 0) << result.err;
  }
  std::string training() {
    return small_training(6) +
           "--model.experts=5 --train.save_interval=2 "
           "--train.lr=0.01 --checkpoint.keep_last=3 --train.progress=off ";
  }
  std::string checkpoint(int step) {
    return join_path(checkpoints_folder(run()), checkpoint_name(step));
  }
  std::string inspect(const std::string& words) { return "$moemamba inspect " + words; }
  Result inspected(const std::string& words) { return shell(inspect(words)); }
  // Flips one bit.
  void damage(const std::string& path, size_t byte) {
    std::string text = read_file(path);
    ASSERT_LT(byte, text.size()) << path;
    text[byte] = char(text[byte] ^ 4);
    PosixFileSystem files;
    write_file(files, path, text);
  }
  void expect_same_files(const std::string& a, const std::string& b) {
    int compared = 0;
    for (const auto& entry : fs::directory_iterator(a)) {
      const std::string name = entry.path().filename().string();
      if (name == kManifestName) continue;  // names run and generation
      ++compared;
      EXPECT_TRUE(file_exists(join_path(b, name))) << name;
      EXPECT_TRUE(read_file(join_path(a, name)) == read_file(join_path(b, name))) << name;
    }
    EXPECT_EQ(size_t(compared + 1), size_t(std::distance(fs::directory_iterator(b), {})));
  }
};

TEST_F(Inspect, ListsCheckpointsNewestFirstWithWhatIsWrong) {
  train();
  fs::create_directory(checkpoint(8) + ".tmp-3-77");
  fs::create_directory(checkpoint(1) + ".damaged-2");
  Result result = inspected("list " + run());
  EXPECT_EQ(result.code, 0) << result.err;
  const size_t six = result.out.find("\n         6 "), two = result.out.find("\n         2 ");
  EXPECT_LT(six, two) << result.out;
  EXPECT_EQ(count(result.out, "complete"), 3) << result.out;
  EXPECT_EQ(count(result.out, "2 ranks, experts over 2"), 3) << result.out;
  EXPECT_EQ(count(result.out, "attempt: step-00000008.tmp-3-77"), 1) << result.out;
  EXPECT_EQ(count(result.out, "damaged: step-00000001.damaged-2"), 1) << result.out;

  damage(join_path(checkpoint(4), kManifestName), 100);
  fs::remove(join_path(checkpoint(2), "model-00002-of-00002.safetensors"));
  result = inspected("list --json " + run());
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(count(result.out, "\"complete\": true"), 1) << result.out;
  EXPECT_EQ(count(result.out, "\"complete\": false"), 2) << result.out;
  EXPECT_EQ(count(result.out, "\"kind\": \"attempt\""), 1) << result.out;

  EXPECT_EQ(inspected("list nowhere").code, 2);
  EXPECT_EQ(inspected("list").code, 2);
  EXPECT_EQ(inspected("").code, 2);
}

TEST_F(Inspect, ShowsTheManifest) {
  train();
  Result result = inspected("show " + run());
  EXPECT_EQ(result.code, 0) << result.err;
  for (const char* part : {"step        6\n", "experts over 2, 5 of them", "next sample 24\n",
                           "model-00001-of-00002.safetensors", "state hash"})
    EXPECT_EQ(count(result.out, part), 1) << part << "\n" << result.out;
  EXPECT_EQ(count(result.out, "embedding.weight"), 0);
  result = inspected("show --tensors --step 4 " + run());
  EXPECT_EQ(count(result.out, "step        4\n"), 1) << result.out;
  EXPECT_EQ(count(result.out, "  embedding.weight [257, 16]\n    value model-"), 1) << result.out;
  EXPECT_EQ(count(result.out, "experts.4.up.weight"), 1) << result.out;
  result = inspected("show --json --tensors " + checkpoint(2) + "/");
  EXPECT_EQ(count(result.out, "\"step\": 2,"), 1) << result.out;
  EXPECT_EQ(count(result.out, "\"name\": \"embedding.weight\""), 1);
  result = inspected("show --step 3 " + run());
  EXPECT_EQ(result.code, 2);
  EXPECT_EQ(count(result.err, "no checkpoint of step 3; there are those of 6, 4, 2"), 1)
      << result.err;
  damage(join_path(checkpoint(6), kManifestName), 50);
  EXPECT_EQ(inspected("show " + run()).code, 1);
}

TEST_F(Inspect, VerifiesEveryByteAndNamesEveryProblem) {
  train();
  Result result = inspected("verify " + run());
  EXPECT_EQ(result.code, 0) << result.out << result.err;
  EXPECT_EQ(count(result.out, ": good: "), 3) << result.out;

  const std::string shard = join_path(checkpoint(4), "model-00001-of-00002.safetensors");
  damage(shard, read_file(shard).size() - 1);  // a value
  damage(join_path(checkpoint(4), "optimizer-exp_avg-00002-of-00002.safetensors"),
         4000);  // a header
  damage(join_path(checkpoint(4), "model.safetensors.index.json"), 40);
  put("run/checkpoints/" + checkpoint_name(4) + "/stranger", "?");
  result = inspected("verify " + run());
  EXPECT_EQ(result.code, 1) << result.out;
  EXPECT_EQ(count(result.out, ": good: "), 2) << result.out;
  EXPECT_EQ(count(result.out, "damaged: SHA-256"), 3) << result.out;
  EXPECT_EQ(count(result.out, "have the hash"), 1) << result.out;
  EXPECT_EQ(count(result.out, "note: "), 1) << result.out;
  EXPECT_EQ(inspected("verify --step 2 " + run()).code, 0);
  result = inspected("verify --json --step 4 " + run());
  EXPECT_EQ(result.code, 1);
  EXPECT_EQ(count(result.out, "\"good\": false"), 2) << result.out;

  const std::string lost = join_path(checkpoint(2), "optimizer-exp_avg-00001-of-00002.safetensors");
  const std::string elsewhere = *this / "elsewhere";
  fs::rename(lost, elsewhere);
  fs::create_symlink(elsewhere, lost);  // not followed
  fs::resize_file(join_path(checkpoint(2), "model-00002-of-00002.safetensors"), 100);
  result = inspected("verify --step 2 " + run());
  EXPECT_EQ(result.code, 1);
  EXPECT_EQ(count(result.out, "2 problems"), 1) << result.out;
  damage(join_path(checkpoint(6), kManifestName), 60);
  EXPECT_EQ(inspected("verify --step 6 " + run()).code, 1);
  EXPECT_EQ(inspected("verify nowhere").code, 2);
}

TEST_F(Inspect, NamesWhatDiffersBetweenTwoCheckpoints) {
  train();
  Result result = inspected("diff " + run() + " " + checkpoint(6));
  EXPECT_EQ(result.code, 0) << result.out << result.err;
  result = inspected("diff " + run() + ":4 " + run() + ":6");
  EXPECT_EQ(result.code, 1) << result.err;
  EXPECT_EQ(count(result.out, "step: 4 in A, 6 in B"), 1) << result.out;
  EXPECT_EQ(count(result.out, "head.weight value: "), 1) << result.out;
  EXPECT_EQ(count(result.out, "head.weight exp_avg_sq: "), 1) << result.out;
  result = inspected("diff --json " + run() + ":4 " + run());
  EXPECT_EQ(result.code, 1);
  EXPECT_EQ(count(result.out, "\"equal\": false"), 1) << result.out;

  EXPECT_EQ(shell("mv run first; $moemamba train " + training() +
                  "--train.lr=0.02 --model.experts=4; mv run second")
                .code,
            0);
  result = inspected("diff first:2 second:2");
  EXPECT_EQ(result.code, 1);
  EXPECT_EQ(count(result.out, "train.lr: 0.01 in A, 0.02 in B\n"), 1) << result.out;
  EXPECT_EQ(count(result.out, "experts.4.up.weight value: only in A"), 1) << result.out;
  EXPECT_EQ(count(result.out, "router.weight value: [5, 16] in A, [4, 16] in B"), 1) << result.out;
  result = inspected("diff first:2 first:3");
  EXPECT_EQ(result.code, 2);
  EXPECT_EQ(inspected("diff first:2").code, 2);
}

TEST_F(Inspect, ReshardsToTheBytesThatTheOtherLayoutWrites) {
  train();
  ASSERT_EQ(shell("mv run two").code, 0);
  for (const auto& [ranks, expert] : {std::pair(1, 1), {2, 1}, {4, 2}, {3, 3}}) {
    const std::string layout = "--ranks " + std::to_string(ranks) + " ";
    const Result result = inspected("reshard two --step 6 --output made " + layout + "--expert " +
                                    std::to_string(expert));
    ASSERT_EQ(result.code, 0) << result.err;
    EXPECT_EQ(inspected("verify made").code, 0) << ranks;
    EXPECT_EQ(inspected("diff made two").code, 0) << ranks;
    // Two ranks have really written `two`; from what the other layout would have written they would
    // write the same.
    ASSERT_EQ(inspected("reshard made --output back --ranks 2 --expert 2").code, 0);
    expect_same_files(*this / "two/checkpoints/step-00000006", *this / "back");
    fs::remove_all(*this / "made");
    fs::remove_all(*this / "back");
  }
}

TEST_F(Inspect, WhatReshardWritesTrainsOnAsTheOriginal) {
  train();
  const std::string more = training() + "--train.steps=8 ";
  ASSERT_EQ(
      inspected("reshard run --step 4 --ranks 1 --output other/checkpoints/" + checkpoint_name(4))
          .code,
      0);
  EXPECT_TRUE(
      file_exists(*this / "other/checkpoints/step-00000004/model-00001-of-00001.safetensors"));
  ASSERT_EQ(shell("cp run/config.textproto run/metrics.jsonl other/ && mv run first && "
                  "mv other run")
                .code,
            0);
  const Result result = shell("$moemamba train " + more + "--train.progress=on");
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(count(result.err, "step-00000004; 5 experts: 1 ranks -> 1"), 1) << result.err;
  const auto a = numbers_of(read_file(*this / "first/metrics.jsonl"), "loss");
  const auto b = numbers_of(read_file(*this / "run/metrics.jsonl"), "loss");
  ASSERT_EQ(a.size(), 6u);
  ASSERT_EQ(b.size(), 8u);
  EXPECT_NEAR(a[4], b[4], 1e-5);  // of the loaded values; the learning rate then is another
}

TEST_F(Inspect, ReshardWritesWeightsAloneAndRefusesWhatCannotBe) {
  train();
  const std::string words = "reshard run --output made ";
  ASSERT_EQ(inspected(words + "--weights-only").code, 0);
  EXPECT_EQ(
      shell("$moemamba evaluate --run run --weights made --data.validation=tokens/validation").code,
      0);
  // The last checkpoint holds the weights with which the run ended.
  const Result a = shell("$moemamba generate --run run --weights made --prompt The --tokens 8");
  const Result b = shell("$moemamba generate --run run --prompt The --tokens 8");
  EXPECT_EQ(a.code, 0) << a.err;
  EXPECT_EQ(a.out, b.out);
  Result result = inspected(words + "--ranks 1");  // "made" is there
  EXPECT_EQ(result.code, 1);
  EXPECT_EQ(count(result.err, "is there already"), 1) << result.err;
  result = inspected("reshard run --output made2 --json --weights-only");
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(nlohmann::json::parse(result.out),
            nlohmann::json::parse(R"({"output": "made2", "step": 6, "weights_only": true,
                "source": "run/checkpoints/step-00000006",
                "from": {"ranks": 2, "expert_ranks": 2}})"));
  result = inspected("reshard run --step 4 --output made3 --ranks 4 --expert 1 --json");
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(nlohmann::json::parse(result.out),
            nlohmann::json::parse(R"({"output": "made3", "step": 4, "weights_only": false,
                "source": "run/checkpoints/step-00000004",
                "from": {"ranks": 2, "expert_ranks": 2}, "to": {"ranks": 4, "expert_ranks": 1}})"));
  EXPECT_EQ(inspected("reshard run --output x --ranks 4 --expert 3").code, 2);
  EXPECT_EQ(inspected("reshard run --output x").code, 2);
  EXPECT_EQ(inspected("reshard run --ranks 1").code, 2);
  EXPECT_EQ(inspected("reshard run --output step-00000001 --ranks 1").code, 1);  // of step 6
  const std::string shard = join_path(checkpoint(6), "model-00001-of-00002.safetensors");
  damage(shard, read_file(shard).size() - 9);
  EXPECT_EQ(inspected("reshard run --output x --ranks 1").code, 1);
  EXPECT_FALSE(file_exists(*this / "x"));
  for (const auto& entry : fs::directory_iterator(*this / "."))
    EXPECT_EQ(entry.path().filename().string().find(".tmp-"), std::string::npos) << entry.path();
}

TEST_F(Inspect, PrunesAsTrainingDoes) {
  train();
  Result result = inspected("prune run --keep-last 1 --keep-every 4 --dry-run");
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(count(result.out, "would delete"), 1) << result.out;
  EXPECT_EQ(count(result.out, "2 would stay"), 1) << result.out;
  EXPECT_TRUE(file_exists(checkpoint(2)));
  const auto json = [&](const std::string& words) {
    const Result pruned = inspected("prune run --json " + words);
    EXPECT_EQ(pruned.code, 0) << pruned.err;
    return nlohmann::json::parse(pruned.out);
  };
  const auto place = [](int step) {
    return nlohmann::json{{"step", step}, {"path", "run/checkpoints/" + checkpoint_name(step)}};
  };
  nlohmann::json expected{{"run", "run"},
                          {"dry_run", true},
                          {"deleted", nlohmann::json::array({place(2)})},
                          {"kept", nlohmann::json::array({place(6), place(4)})}};
  EXPECT_EQ(json("--keep-last 2 --dry-run"), expected);
  fs::copy(run(), *this / "whole", fs::copy_options::recursive);
  expected["dry_run"] = false;
  EXPECT_EQ(json("--keep-last 2"), expected);
  EXPECT_FALSE(file_exists(checkpoint(2)));
  expected["deleted"] = nlohmann::json::array();
  EXPECT_EQ(json("--keep-last 2"), expected);
  fs::remove_all(run());
  fs::rename(*this / "whole", run());
  const std::string shard = join_path(checkpoint(6), "model-00001-of-00002.safetensors");
  damage(shard, read_file(shard).size() - 9);
  result = inspected("prune run --keep-last 1");  // 6 is the newest, 4 the newest that holds
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(count(result.out, "2 stay"), 1) << result.out;
  EXPECT_TRUE(file_exists(checkpoint(6)));
  EXPECT_TRUE(file_exists(checkpoint(4)));
  EXPECT_FALSE(file_exists(checkpoint(2)));
  fs::remove(join_path(checkpoint(4), "model-00001-of-00002.safetensors"));
  result = inspected("prune run --keep-last 1");
  EXPECT_EQ(result.code, 1);
  EXPECT_EQ(count(result.err, "none of its checkpoints holds"), 1) << result.err;
  EXPECT_EQ(inspected("prune run").code, 2);
  EXPECT_EQ(inspected("prune run --keep-last 0").code, 2);
  EXPECT_EQ(inspected("prune nowhere --keep-last 1").code, 2);
}

// However few are to be kept, and however many newer ones are damaged.
TEST_F(Inspect, NeverPrunesTheNewestThatHolds) {
  train();
  for (int step : {4, 6}) {
    const std::string shard =
        join_path(checkpoint(step), "optimizer-exp_avg-00002-of-00002.safetensors");
    damage(shard, read_file(shard).size() - 1);
  }
  const Result result = inspected("prune run --keep-last 1");  // 6 is the newest, 2 holds
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_TRUE(file_exists(checkpoint(6)));
  EXPECT_FALSE(file_exists(checkpoint(4)));
  EXPECT_EQ(inspected("verify run --step 2").code, 0);
}

TEST_F(Inspect, LeavesARunAloneThatSomebodyWorksOn) {
  Result pruned{};
  while_training("--train.save_interval=1", [&](const Processes& processes) {
    for (int i = 0; i < 100 && list_checkpoints(run()).empty(); ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
    const std::string out = *this / "prune.out";
    const int status = std::system((MOEMAMBA_BINARY_DIR "/moemamba inspect prune " + run() +
                                    " --keep-last 1 >/dev/null 2>" + out)
                                       .c_str());
    pruned = {WEXITSTATUS(status), "", read_file(out)};
    kill(processes.launchers[0], SIGTERM);
  });
  EXPECT_EQ(pruned.code, 1) << pruned.err;
  EXPECT_EQ(count(pruned.err, "is working on this run"), 1) << pruned.err;
}

}  // namespace
}  // namespace moemamba
