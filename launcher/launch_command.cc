#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>

#include "core/error.h"
#include "core/schema.h"
#include "launcher/build_facts.h"
#include "launcher/commands.h"
#include "launcher/drill.h"
#include "launcher/launch.h"
#include "launcher/settings.h"
#include "launcher/supervisor/hosts.h"
#include "launcher/supervisor/supervisor.h"
#include "runtime/token_files.h"

namespace moemamba {

namespace {

struct LaunchOptions {
  SettingsSource source;
  int ranks = 0;
  bool fresh = false;
  std::vector<std::string> drills;
};

// Else ranks would be lost, or end themselves, between two heartbeats; and a rank that is missed
// has to end before the supervisor, which waits for that, can know of it.
void check_times(const LaunchConfig& launch) {
  const auto need = [](bool holds, const char* what, double wanted, const char* by, double found) {
    if (!holds) throw BadSettings(concat(what, ": must be ", by, " (", wanted, "), found ", found));
  };
  const double heartbeats = 3 * launch.heartbeat_seconds();
  need(launch.lost_seconds() >= heartbeats, "launch.lost_seconds", heartbeats,
       "at least 3 times launch.heartbeat_seconds", launch.lost_seconds());
  need(launch.fence_seconds() > launch.lost_seconds(), "launch.fence_seconds",
       launch.lost_seconds(), "more than launch.lost_seconds", launch.fence_seconds());
}

// Which machines, and how many ranks: what is asked for, what the machines take, one.
void place(const LaunchConfig& launch, LaunchRequest& request) {
  check_times(launch);
  for (const std::string& word : launch.mpirun_options())
    if (word == "--host" || word == "-host" || word == "-H" || word == "--hostfile" ||
        word == "-hostfile" || word == "--machinefile" || word == "-n" || word == "-np")
      throw BadSettings(concat("--launch.mpirun_options=", word,
                               ": give machines with --launch.hostfile=FILE and the number of "
                               "ranks with --ranks"));
  int slots = 0;
  if (!launch.hostfile().empty()) {
    request.hosts = read_hostfile(launch.hostfile());
    for (const HostSlots& host : request.hosts) slots += host.slots;
  } else if (auto allocation = slurm_allocation()) {
    request.hosts = std::move(allocation->hosts);
    request.srun_options = allocation->srun_options;
    slots = allocation->ranks;
    if (slots < 1 && request.ranks == 0)
      throw BadSettings(
          "--ranks: this is a Slurm job that says neither SLURM_NTASKS nor SLURM_TASKS_PER_NODE; "
          "ask Slurm for --ntasks=N or --ntasks-per-node=N, or give --ranks=N for ranks of this "
          "machine alone");
  }
  if (slots > 0 && request.ranks > slots)
    throw BadSettings(concat("--ranks=", request.ranks, ": the machines take ", slots,
                             " ranks; leave it out, or give them more slots"));
  if (request.ranks == 0) request.ranks = std::max(1, slots);
  if (launch.min_ranks() > request.ranks)
    throw BadSettings(concat("launch.min_ranks: must be at most the ", request.ranks,
                             " ranks of the run, found ", launch.min_ranks()));
}

// What every attempt would stumble over.
void check_files(const RunConfig& config) {
  sizes_of(config);  // reads the tokenizer
  for (const auto* files : {&config.data().train(), &config.data().validation()})
    for (const std::string& file : *files) TokenFile opened(file);
}

int supervise(const LaunchOptions& options) {
  if (started_rank() >= 0)
    throw BadSettings("moemamba launch starts mpirun itself; run it without mpirun");
  LaunchRequest request{.ranks = options.ranks, .fresh = options.fresh};
  // Where to is needed to know how many, and that to know whether the settings fit.
  place(read_settings(options.source, Purpose::show, 1).launch(), request);
  request.config = read_settings(options.source, Purpose::train, request.ranks);
  if (!options.fresh && !request.config.overwrite())
    check_goes_on(request.config, stderr, /*quietly=*/true);
  check_files(request.config);
  request.words = {"train"};
  for (const std::string& drill : options.drills) {
    request.words.emplace_back("--drill");
    request.words.push_back(parse_drill(drill).text);
  }
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
  command
      ->add_option("--ranks", options->ranks,
                   "Processes to train with (default: all that launch.hostfile or the Slurm\n"
                   "allocation has places for, else 1)")
      ->type_name("N")
      ->check(CLI::Range(1, 4096).description(""));
  command->add_flag("--fresh", options->fresh,
                    "Begin in an empty folder or not at all; never go on with a run");
  add_drill_option(*command, options->drills);
  add_settings_options(*command, options->source);
  command->footer([] {
    return "Takes all options of `moemamba train`, with or without a -- before them:\n"
           "  moemamba launch --ranks 4 --run=runs/mine --train.save_interval=500 ...\n"
           "A rank that dies, hangs or is cut off: everything is ended and starts again from the "
           "newest\n"
           "checkpoint. The page of the run is printed; events.jsonl in its folder has what "
           "happened.\n"
           "Ctrl-C (SIGINT), SIGTERM and SIGUSR1 end the run with a checkpoint within "
           "launch.grace_seconds;\n"
           "the next one ends it at once. If the supervisor itself dies, the same command takes "
           "the\n"
           "running job over, within launch.fence_seconds.\n"
           "Exit codes: 0 done; 75 ended early as asked: start the same command again; 1 do not "
           "restart: a\n"
           "crash loop, or no progress; 2 settings are wrong; 130 Ctrl-C.\n"
           "\nSettings, with their defaults:\n" +
           settings_help(run_config_descriptors(), "moemamba.RunConfig");
  });
  return [command, options] {
    take_remaining(*command, options->source);
    return supervise(*options);
  };
}

}  // namespace moemamba
