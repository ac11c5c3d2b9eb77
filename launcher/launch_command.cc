#include <CLI/CLI.hpp>
#include <cstdio>

#include "core/error.h"
#include "core/schema.h"
#include "launcher/build_facts.h"
#include "launcher/commands.h"
#include "launcher/launch.h"
#include "launcher/settings.h"
#include "launcher/supervisor/hosts.h"
#include "launcher/supervisor/supervisor.h"

namespace moemamba {

namespace {

struct LaunchOptions {
  SettingsSource source;
  int ranks = 0;
  bool fresh = false;
};

int supervise(const LaunchOptions& options) {
  if (started_rank() >= 0)
    throw BadSettings("moemamba launch starts mpirun itself; run it without mpirun");
  LaunchRequest request{.ranks = options.ranks, .fresh = options.fresh};
  if (request.ranks == 0) request.ranks = 1;
  request.config = read_settings(options.source, Purpose::train, request.ranks);
  if (!options.fresh && !request.config.overwrite())
    check_goes_on(request.config, stderr, /*quietly=*/true);
  request.words = {"train"};
  for (const std::string& file : options.source.files) {
    request.words.emplace_back("--config");
    request.words.push_back(file);
  }
  request.words.insert(request.words.end(), options.source.options.begin(),
                       options.source.options.end());
  return Supervisor(std::move(request)).run();
}

}  // namespace

Command add_launch(CLI::App& app, const Words&) {
  CLI::App* command = app.add_subcommand("launch", "Train, and start again whatever fails");
  auto options = std::make_shared<LaunchOptions>();
  add_ranks_option(*command, options->ranks);
  command->add_flag("--fresh", options->fresh,
                    "Begin in an empty folder or not at all; never go on with a run");
  add_settings_options(*command, options->source);
  return [command, options] {
    take_remaining(*command, options->source);
    return supervise(*options);
  };
}

}  // namespace moemamba
