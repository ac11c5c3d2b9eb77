// What a run writes of its model's text between the steps.
#include "runtime/samples.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>

#include "runtime/plan.h"
#include "tests/support/in_world.h"
#include "tests/support/small_run.h"
#include "tests/support/systems.h"
#include "tests/support/temporary_folder.h"
#include "tests/support/training.h"
#include "tests/support/wrapped_files.h"

namespace moemamba {
namespace {

constexpr const char* kSampled = "sample_tokens: 6 eval_interval: 2";

const std::string& held_out() {
  static const std::string text = concat("validation: '", synthetic_tokens(61), "'");
  return text;
}

SmallRun sampled_run(const std::string& folder, int ranks, int expert) {
  SmallRun run{.folder = folder, .ranks = ranks, .expert = expert, .data = held_out().c_str()};
  run.train = kSampled;
  return run;
}

std::vector<nlohmann::json> samples_of(const std::string& run) {
  std::vector<nlohmann::json> rows;
  std::ifstream file(join_path(run, "samples.jsonl"));
  for (std::string line; std::getline(file, line);) rows.push_back(nlohmann::json::parse(line));
  return rows;
}

// What `moemamba generate` makes of the run's weights.
std::string generated(const SmallRun& run, const std::string& prompt) {
  const TrainRequest request = request_of(run);
  const std::unique_ptr<FILE, int (*)(FILE*)> out(std::tmpfile(), std::fclose);
  std::string text;
  in_world(RankLayout(run.ranks, run.expert, int(run.experts)), [&](ProcessGroups& groups) {
    const std::string own = run_generation(
        groups,
        {.model = request.model,
         .parallel = request.parallel,
         .train = request.train,
         .data = request.data,
         .weights = run.folder},
        prompt, {.tokens = request.train.sample_tokens(), .temperature = 0.8, .seed = run.seed},
        out.get());
    if (groups.rank == 0) text = own;
  });
  return text;
}

TEST(Samples, FollowEveryEvaluationAndAreWhatTheWeightsSay) {
  for (auto [ranks, expert] : {std::pair{1, 1}, {2, 1}, {2, 2}, {3, 3}})
    for (const char* model : {"", "capacity_factor: 0.5", "pattern: 'attention, moe' heads: 2"}) {
      TemporaryFolder folder;
      SmallRun run = sampled_run(folder / "run", ranks, expert);
      run.model = model;
      launch(run);
      const auto rows = samples_of(run.folder);
      ASSERT_EQ(rows.size(), 4u) << ranks << " ranks, " << model;
      for (size_t i = 0; i < rows.size(); ++i) {
        EXPECT_EQ(rows[i].size(), 3u);
        EXPECT_EQ(rows[i]["step"], 2 * i + 1);
        EXPECT_EQ(rows[i]["prompt"], rows[0]["prompt"]);
        EXPECT_FALSE(rows[i]["text"].get<std::string>().empty());
      }
      const std::string text = rows[3]["text"];
      EXPECT_EQ(
          nlohmann::json::parse(sample_line(7, "", generated(run, rows[0]["prompt"])))["text"],
          text)
          << ranks << " ranks, " << model;
    }
}

TEST(Samples, ChangeNoNumberOfTheTraining) {
  for (auto [ranks, expert] : {std::pair{1, 1}, {2, 2}}) {
    TemporaryFolder folder;
    SmallRun run = sampled_run(folder / "with", ranks, expert);
    run.model = "router: SIGMOID router_bias_rate: 0.01";
    launch(run);
    run.folder = folder / "without";
    run.train = "eval_interval: 2";
    launch(run);
    EXPECT_FALSE(file_exists(join_path(run.folder, "samples.jsonl")));
    EXPECT_EQ(steps_of(folder / "with"), steps_of(folder / "without"));
    EXPECT_EQ(newest_manifest(folder / "with").state_hash(),
              newest_manifest(folder / "without").state_hash());
  }
}

// A launch that goes on takes its samples again, and so does one that goes back.
TEST(Samples, AreThereOnceHoweverTheRunWent) {
  TemporaryFolder folder;
  SmallRun run = sampled_run(folder / "whole", 2, 2);
  run.save_interval = 3;
  launch(run);
  const auto rows = samples_of(run.folder);
  run.folder = folder / "resumed";
  SmallRun part = run;
  part.crash_at = 5;
  EXPECT_NE(message_of([&] { launch(part); }).find("as the test wants"), std::string::npos);
  EXPECT_EQ(samples_of(run.folder).size(), 2u);
  std::ofstream(join_path(run.folder, "samples.jsonl"), std::ios::app) << "{\"step\":4,\"pro";
  launch(run);
  EXPECT_EQ(samples_of(run.folder), rows);
  run.folder = folder / "rolled back";
  std::vector<std::string> kinds;
  run.on_event = [&](const RunEvent& event) {
    if (event.kind() == "replayed" || event.kind() == "rolled_back") kinds.push_back(event.kind());
  };
  run.spoil = [left = std::make_shared<int>(2)](int rank, int64_t step) {
    return rank == 1 && step == 5 && (*left)-- > 0;
  };
  launch(run);
  EXPECT_EQ(kinds, (std::vector<std::string>{"replayed", "rolled_back"}));
  EXPECT_EQ(samples_of(run.folder), rows);
}

TEST(Samples, TakeThePlannedMemoryToTheByte) {
  for (const System& system : kSystems)
    for (auto [ranks, expert] : {std::pair{1, 1}, {2, 2}}) {
      TrainerOptions options = trainer_options(
          TrainingCase{.vocabulary = 257, .batch = 4, .steps = 1, .model = system.model});
      options.sample_tokens = 5;
      const RankLayout layout(ranks, options.sizes.E > 0 ? expert : 1, int(options.sizes.E));
      const PlannedBytes planned = planned_bytes(options, layout);
      options.sample_tokens = 0;
      const PlannedBytes without = planned_bytes(options, layout);
      EXPECT_EQ(without.samples, 0) << system.name;
      EXPECT_EQ(planned.total(), without.total() + planned.samples) << system.name;
      EXPECT_EQ(planned.trainer, without.trainer) << system.name;
      in_world(layout, [&](ProcessGroups& groups) {
        Trainer trainer(groups, options);
        const HeldOut held = open_held_out({synthetic_tokens(61)});
        Samples samples(trainer.session(), Tokenizer::bytes(), held, {.tokens = 5});
        trainer.session().arena.reset_peak();
        samples.take();
        EXPECT_EQ(samples.bytes(), planned.samples) << system.name;
        EXPECT_LE(trainer.session().arena.peak(), planned.trainer.activations) << system.name;
      });
    }
}

// Token files of a tokenizer of its own, as `moemamba prepare` would make them.
TEST(Samples, BeginWithWholeWordsOfTheHeldOutText) {
  TemporaryFolder folder;
  WrappedFiles files;
  std::string text;
  for (int i = 0; i < 60; ++i)
    text += concat("The cat number ", i, " sat down upon a mat, and it was content.\n");
  const Tokenizer bpe = Tokenizer::train_bpe(std::vector<std::string>{text}, 300);
  bpe.save(files, folder / "tokenizer.model");
  for (const auto& [name, tokenizer] : {std::pair("bytes", Tokenizer::bytes()), {"bpe", bpe}}) {
    const std::string tokens = folder / name;
    TokenWriter writer(files, tokens, TokenFormat::megatron, tokenizer.vocabulary());
    std::vector<int32_t> ids = tokenizer.encode(text);
    ids.push_back(tokenizer.end_of_document());
    writer.add_document(ids);
    writer.commit();
    const std::string data =
        concat("train: '", tokens, "' validation: '", tokens, "' tokenizer: '",
               tokenizer.kind() == TokenizerKind::bpe ? folder / "tokenizer.model" : "bytes", "'");
    SmallRun run = sampled_run(concat(folder / "run-", name), 2, 2);
    run.data = data.c_str();
    run.train = "sequence_length: 40 sample_tokens: 9";
    launch(run);
    const auto rows = samples_of(run.folder);
    ASSERT_EQ(rows.size(), 1u);
    const std::string prompt = rows[0]["prompt"];
    EXPECT_GT(prompt.size(), 10u);
    EXPECT_EQ(text.rfind(prompt, 0), 0u) << prompt;
    EXPECT_EQ(text[prompt.size()], ' ') << prompt;
    run.folder += "-given";
    run.train = "sequence_length: 40 sample_tokens: 9 sample_prompt: 'It was a mat'";
    launch(run);
    EXPECT_EQ(samples_of(run.folder).at(0)["prompt"], "It was a mat");
  }
}

TEST(Samples, RefuseWhatHasNoRoomAndNoText) {
  TemporaryFolder folder;
  const auto message = [&](const char* train, int64_t vocabulary) {
    SmallRun run = sampled_run(folder / "run", 1, 1);
    run.train = train;
    run.vocabulary = vocabulary;
    return message_of([&] { launch(run); });
  };
  EXPECT_NE(message("sample_tokens: 6", 61).find("data.tokenizer is \"none\""), std::string::npos);
  EXPECT_NE(message("sample_tokens: 16", 0).find("take at most 15"), std::string::npos);
  EXPECT_NE(message("sample_tokens: 6 sample_prompt: 'eleven byte'", 0)
                .find("train.sample_prompt: 11 tokens, room is for 10"),
            std::string::npos);
  EXPECT_FALSE(file_exists(folder / "run"));
}

TEST(Samples, AreJsonWhateverTheText) {
  for (const std::string text : {"\xFF\xFE", "a\nb\"c\\", "\xE2\x82", ""}) {
    const std::string line = sample_line(3, text, text);
    EXPECT_EQ(std::ranges::count(line, '\n'), 1);
    EXPECT_EQ(nlohmann::json::parse(line)["step"], 3);
  }
}

}  // namespace
}  // namespace moemamba
