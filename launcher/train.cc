#include <CLI/CLI.hpp>

#include "core/schema.h"
#include "launcher/build_facts.h"
#include "launcher/commands.h"
#include "launcher/launch.h"
#include "launcher/rank.h"
#include "launcher/settings.h"
#include "runtime/commands.h"

namespace moemamba {

namespace {

struct TrainOptions {
  SettingsSource source;
  int ranks = 1;
};

TrainRequest request_of(const RunConfig& config, int threads) {
  const Terminal terminal = find_terminal();
  return {.model = config.model(),
          .parallel = config.parallel(),
          .train = config.train(),
          .data = config.data(),
          .run = config.run(),
          .overwrite = config.overwrite(),
          .init_from = config.init_from(),
          .resolved_text = resolved_text(config),
          .threads = threads,
          .terminal = terminal.present,
          .color = terminal.color,
          .columns = terminal.columns};
}

int train(const TrainOptions& options, const Words& words) {
  const bool launches = must_launch(options.ranks);
  const RunConfig config = read_settings(options.source, Purpose::train,
                                         launches ? options.ranks : started_ranks());
  if (launches) return launch(options.ranks, words);
  run_rank(config, [&](Rank& rank) {
    PosixFileSystem files;
    run_training(files, rank.groups, request_of(config, rank.threads));
  });
  return 0;
}

}  // namespace

Command add_train(CLI::App& app, const Words& words) {
  CLI::App* command = app.add_subcommand("train", "Train a model");
  auto options = std::make_shared<TrainOptions>();
  add_ranks_option(*command, options->ranks);
  add_settings_options(*command, options->source);
  command->footer([] {
    return "Leaves settings, metrics.jsonl, loss.svg and weights in the run's folder.\n"
           "Exit codes: 0 done; 1 failed; 2 settings are wrong; 75 a rank was lost, start again.\n"
           "\nSettings, with their defaults:\n" +
           settings_help(run_config_descriptors(), "moemamba.RunConfig");
  });
  return [command, options, &words] {
    take_remaining(*command, options->source);
    return train(*options, words);
  };
}

}  // namespace moemamba
