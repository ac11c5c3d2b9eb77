#include "runtime/bench_checkpoint.h"

#include <CLI/CLI.hpp>
#include <cstdio>

#include "core/schema.h"
#include "launcher/bench.h"
#include "launcher/launch.h"
#include "launcher/rank.h"

namespace moemamba {

namespace {

struct Options {
  SettingsSource source;
  int ranks = 1;
  int64_t repeat = 20;
};

int measure(const Options& options, const Words& words) {
  const bool launches = must_launch(options.ranks);
  const RunConfig config = read_bench_settings(options.source, small_model(),
                                               launches ? options.ranks : started_ranks());
  if (!config.has_run() || config.run().empty())
    throw BadSettings("bench checkpoint: give the folder, on the disk to measure: --run=FOLDER");
  const ModelSizes sizes = sizes_of(config);
  if (launches) return launch(options.ranks, words, OnSignal::end);
  run_rank(config, [&](Rank& rank) {
    PosixFileSystem files;
    const bool makes_folder = rank.world.rank() == 0 && !file_exists(config.run());
    const CheckpointBench result = bench_checkpoint(
        files, rank.groups, sizes,
        {.folder = join_path(config.run(), "bench-checkpoint"), .repeat = options.repeat});
    if (rank.world.rank() == 0) std::fputs(checkpoint_bench_text(result).c_str(), stdout);
    if (makes_folder) files.remove(config.run());
  });
  return 0;
}

}  // namespace

Command add_bench_checkpoint(CLI::App& bench, const Words& words) {
  auto options = std::make_shared<Options>();
  CLI::App* app = bench.add_subcommand("checkpoint", "Saving and loading a model's whole state");
  add_ranks_option(*app, options->ranks);
  add_repeat_option(*app, options->repeat);
  add_settings_options(*app, options->source);
  app->footer(
      "Writes to --run=FOLDER/bench-checkpoint, which is deleted before and after, and compares\n"
      "with SHA-256, a plain write and a plain read of the same bytes in the same folder. Without\n"
      "--config the model is about the quickstart's. Example:\n"
      "  moemamba bench checkpoint --run=/scratch/mine --config configs/moe_mamba_25m.textproto\n"
      "Everything else on the line is a setting, as in `moemamba train`.");
  return [app, options, &words] {
    take_remaining(*app, options->source);
    return measure(*options, words);
  };
}

}  // namespace moemamba
