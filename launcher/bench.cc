#include <CLI/CLI.hpp>
#include <cstdio>
#include <filesystem>

#include "core/schema.h"
#include "launcher/commands.h"
#include "launcher/launch.h"
#include "launcher/rank.h"
#include "launcher/settings.h"
#include "runtime/bench_step.h"
#include "runtime/commands.h"

namespace moemamba {

namespace {

struct BenchOptions {
  SettingsSource source;
  int ranks = 1;
  StepBenchOptions step;
};

// Token files of the settings, or one of ours in the temporary folder, written once and kept.
std::vector<std::string> token_files(const RunConfig& config, int64_t vocabulary, int64_t needed) {
  if (config.data().train_size() > 0)
    return {config.data().train().begin(), config.data().train().end()};
  const std::string stem = (std::filesystem::temp_directory_path() /
                            concat("moemamba-zipf-", vocabulary, "-", needed))
                               .string();
  PosixFileSystem files;
  if (!file_exists(stem + ".idx")) write_zipf_tokens(files, stem, vocabulary, needed);
  return {stem};
}

int bench_step(const BenchOptions& options, const Words& words) {
  const bool launches = must_launch(options.ranks);
  const RunConfig config = read_settings(options.source, Purpose::show,
                                         launches ? options.ranks : started_ranks());
  if (launches) return launch(options.ranks, words, OnSignal::end);
  run_rank(config, [&](Rank& rank) {
    const auto tokenizer = open_tokenizer(config.data().tokenizer());
    const ModelSizes sizes = model_sizes(
        config.model(), config.model().vocabulary() ? 0 : vocabulary_of(tokenizer),
        config.train().sequence_length());
    TrainerOptions trainer = trainer_options(sizes, config.parallel(), config.train());
    const int64_t batch = trainer.data.global_batch * (trainer.data.sequence_length + 1);
    if (rank.world.rank() == 0)
      token_files(config, sizes.V, std::max<int64_t>(1 << 22, 4 * batch));
    Stream host = Stream::immediate();
    barrier(*rank.groups.control, host);
    trainer.data.files = token_files(config, sizes.V, std::max<int64_t>(1 << 22, 4 * batch));
    trainer.threads = rank.threads;
    const StepBench result = bench_step(rank.groups, trainer, options.step);
    if (rank.world.rank() == 0) std::fputs(step_bench_text(result).c_str(), stdout);
  });
  return 0;
}

}  // namespace

Command add_bench(CLI::App& app, const Words& words) {
  CLI::App* command = app.add_subcommand("bench", "Measure this machine");
  command->require_subcommand(1);
  auto options = std::make_shared<BenchOptions>();
  CLI::App* step = command->add_subcommand("step", "Training steps of a model");
  add_ranks_option(*step, options->ranks);
  step->add_option("--steps", options->step.steps, "Steps to measure (default 30)")
      ->type_name("N")
      ->check(CLI::Range(1, 1000000).description(""));
  step->add_option("--warmup", options->step.warmup, "Steps before these (default 10)")
      ->type_name("N")
      ->check(CLI::Range(1, 1000000).description(""));
  step->add_flag("--profile", options->step.profile, "Also the time of each kind of work");
  add_settings_options(*step, options->source);
  step->footer(
      "Without data.train the tokens are random, as frequent as those of a text. Example:\n"
      "  moemamba bench step --config configs/moe_mamba_25m.textproto --model.compute_dtype=BF16\n"
      "Everything else on the line is a setting, as in `moemamba train`.");
  return [step, options, &words] {
    take_remaining(*step, options->source);
    return bench_step(*options, words);
  };
}

}  // namespace moemamba
