#include "runtime/bench_step.h"

#include <CLI/CLI.hpp>
#include <cstdio>

#include "launcher/bench.h"
#include "launcher/launch.h"
#include "launcher/rank.h"

namespace moemamba {

namespace {

struct Options {
  SettingsSource source;
  int ranks = 1;
  StepBenchOptions step;
};

int measure(const Options& options, const Words& words) {
  const bool launches = must_launch(options.ranks);
  const RunConfig config =
      read_settings(options.source, Purpose::show, launches ? options.ranks : started_ranks());
  if (launches) return launch(options.ranks, words, OnSignal::end);
  run_rank(config, [&](Rank& rank) {
    const StepBench result = bench_step(rank.groups, bench_trainer(rank, config), options.step);
    if (rank.world.rank() == 0) std::fputs(step_bench_text(result).c_str(), stdout);
  });
  return 0;
}

}  // namespace

Command add_bench_step(CLI::App& bench, const Words& words) {
  auto options = std::make_shared<Options>();
  CLI::App* step = bench.add_subcommand("step", "Training steps of a model");
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
    return measure(*options, words);
  };
}

}  // namespace moemamba
