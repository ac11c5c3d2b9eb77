#include <CLI/CLI.hpp>

#include "core/schema.h"
#include "launcher/build_facts.h"
#include "launcher/commands.h"
#include "launcher/drill.h"
#include "launcher/events_file.h"
#include "launcher/launch.h"
#include "launcher/rank.h"
#include "launcher/settings.h"
#include "launcher/stop_signals.h"
#include "launcher/under_supervisor.h"
#include "runtime/commands.h"

namespace moemamba {

namespace {

struct TrainOptions {
  SettingsSource source;
  int ranks = 1;
  bool fresh = false;
  std::vector<std::string> drills;
};

std::string build_text() {
  std::string text;
  for (const auto& [name, value] : build_facts()) text += concat(name, ": ", value, "\n");
  return text;
}

TrainRequest request_of(const RunConfig& config, int threads) {
  const Terminal terminal = find_terminal();
  return {.model = config.model(),
          .parallel = config.parallel(),
          .train = config.train(),
          .data = config.data(),
          .checkpoint = config.checkpoint(),
          .run = config.run(),
          .overwrite = config.overwrite(),
          .fresh = false,
          .init_from = config.init_from(),
          .resolved_text = resolved_text(config),
          .build = build_text(),
          .threads = threads,
          .terminal = terminal.present,
          .color = terminal.color,
          .columns = terminal.columns};
}

// What the one that speaks for all ranks says when a signal asks the run to stop.
std::string notice() {
  if (started_rank() > 0) return "";
  return concat(find_terminal().present ? "\n" : "",  // the progress line is still open there
                "moemamba: ending after this step; the next signal ends it at once\n");
}

// ranks: how many the run will have.
std::vector<Drill> parse_drills(const std::vector<std::string>& texts, int ranks, bool speaks) {
  std::vector<Drill> drills;
  for (const std::string& text : texts) drills.push_back(parse_drill(text));
  for (const Drill& drill : drills)
    if (speaks && drill.rank >= ranks)
      std::fprintf(stderr, "moemamba: --drill \"%s\": there is no such rank among %d\n",
                   drill.text.c_str(), ranks);
  return drills;
}

// Without a supervisor, which does it else.
void write_events(TrainRequest& request) {
  request.on_event = [file = EventsFile(request.run)](const RunEvent& event) mutable {
    file.add({.wall_seconds = wall_seconds(),
              .kind = event.kind(),
              .step = event.step(),
              .text = event.text(),
              .seconds = event.has_seconds() ? event.seconds() : -1,
              .job = ""});
    file.write();
  };
}

int train(const TrainOptions& options, const Words& words) {
  const bool launches = must_launch(options.ranks);
  const RunConfig config =
      read_settings(options.source, Purpose::train, launches ? options.ranks : started_ranks());
  // The first rank speaks for all, and where there is a launcher, that one.
  if (!options.fresh && !config.overwrite())
    check_goes_on(config, started_rank() <= 0 ? stderr : nullptr, launches);
  const std::vector<Drill> drills =
      parse_drills(options.drills, launches ? options.ranks : started_ranks(),
                   launches || (started_rank() <= 0 && options.ranks == 1));
  if (launches) return launch(options.ranks, words, OnSignal::ask);
  const StopSignals signals(notice());
  std::atomic<bool> stop_ordered = false;
  const std::unique_ptr<Agent> agent = join_supervisor(config, [&] { stop_ordered = true; });
  const bool stopped = run_with_goodbye(agent.get(), [&] {
    bool stops = false;
    const auto work = [&](Rank& rank) {
      PosixFileSystem files;
      TrainRequest request = request_of(config, rank.threads);
      request.stop_wanted = [&] { return signals.received() != 0 || stop_ordered; };
      request.fresh = options.fresh;
      wire_drills(drills, rank.groups.rank, request);
      write_events(request);
      report_to(agent.get(), rank.groups, request);
      stops = run_training(files, rank.groups, request).stopped;
    };
    run_rank(config, work, agent ? &agent->activity() : nullptr);
    return stops;
  });
  if (!stopped) return 0;
  return started_rank() < 0 && signals.received() == SIGINT ? 128 + SIGINT : kExitRestart;
}

}  // namespace

Command add_train(CLI::App& app, const Words& words) {
  CLI::App* command = app.add_subcommand("train", "Train a model");
  auto options = std::make_shared<TrainOptions>();
  add_ranks_option(*command, options->ranks);
  command->add_flag("--fresh", options->fresh,
                    "Begin in an empty folder or not at all; never go on with a run");
  add_drill_option(*command, options->drills);
  add_settings_options(*command, options->source);
  command->footer([] {
    return "Leaves settings, metrics.jsonl, loss.svg, checkpoints and weights in the run's "
           "folder.\n"
           "The same command again goes on from the newest checkpoint that holds, on any number of "
           "ranks.\n"
           "Ctrl-C (SIGINT), SIGTERM and SIGUSR1 end the run after the step at hand or the next, "
           "with a "
           "checkpoint;\n"
           "the next one ends it at once.\n"
           "Exit codes: 0 done; 1 failed; 2 settings are wrong; 75 start the same command again: a "
           "rank\n"
           "was lost, or SIGTERM or SIGUSR1 ended the run early; 128 + n ended by signal n.\n"
           "\nSettings, with their defaults:\n" +
           settings_help(run_config_descriptors(), "moemamba.RunConfig");
  });
  return [command, options, &words] {
    take_remaining(*command, options->source);
    return train(*options, words);
  };
}

}  // namespace moemamba
