#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <thread>

#include "core/schema.h"
#include "launcher/build_facts.h"
#include "launcher/commands.h"
#include "launcher/launch.h"

namespace moemamba {

namespace {

// Prints what went wrong. Of several ranks that fail for one reason the nearest to it speaks first,
// and mpirun ends the others before they repeat it: a rank that only lost its peers waits longest.
int report(const std::string& what, int exit_code, std::chrono::milliseconds patience) {
  const int rank = started_rank();
  if (rank >= 0) std::this_thread::sleep_for(patience);
  const std::string who = rank > 0 ? concat("moemamba: rank ", rank, ": ") : "moemamba: ";
  std::fputs((who + what + "\n").c_str(), stderr);
  return exit_code;
}

std::chrono::milliseconds patience_of_others() {
  return std::chrono::milliseconds(started_rank() > 0 ? 2500 : 0);
}

int run(int argc, char** argv) {
  const Words words(argv + 1, argv + argc);
  CLI::App app("Trains language models of Mamba layers and sharded mixtures of experts.",
               "moemamba");
  app.set_version_flag("--version", [] { return version_text(); });
  app.set_help_all_flag("--help-all", "Help of all commands");
  app.require_subcommand(1);
  app.footer(
      "From text to text:\n"
      "  moemamba prepare --output data/mine --held-out-fraction 0.05 texts/\n"
      "  moemamba train --ranks 2 --parallel.expert=2 --run=runs/mine \\\n"
      "    --data.train=data/mine/train --data.validation=data/mine/validation \\\n"
      "    --data.tokenizer=data/mine/tokenizer.model\n"
      "  moemamba generate --run runs/mine --prompt \"It was\"\n"
      "`moemamba COMMAND --help` says more, `moemamba settings` lists every setting.");
  const std::pair<const char*, Command> commands[] = {
      {"prepare", add_prepare(app, words)},   {"train", add_train(app, words)},
      {"launch", add_launch(app, words)},     {"evaluate", add_evaluate(app, words)},
      {"generate", add_generate(app, words)}, {"plan", add_plan(app, words)},
      {"settings", add_settings(app, words)}, {"compare", add_compare(app, words)},
      {"inspect", add_inspect(app, words)},   {"bench", add_bench(app, words)},
      {"doctor", add_doctor(app, words)}};
  try {
    // Between the options of a launch and those of its training there may be a "--".
    Words parsed = words;
    if (!parsed.empty() && parsed.front() == "launch")
      if (const auto dashes = std::find(parsed.begin(), parsed.end(), "--"); dashes != parsed.end())
        parsed.erase(dashes);
    std::reverse(parsed.begin(), parsed.end());  // as the parser wants them
    app.parse(std::move(parsed));
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() != 0) std::fputs("moemamba: ", stderr);
    return app.exit(error, std::cout, std::cerr) == 0 ? 0 : kExitSettings;
  }
  for (const auto& [name, command] : commands)
    if (app.got_subcommand(name)) return command();
  return kExitSettings;
}

}  // namespace

}  // namespace moemamba

// Exit codes: 0 done, 1 failed and will fail again, 2 settings or usage, 75 "restart me".
int main(int argc, char** argv) {
  using namespace moemamba;
  try {
    return run(argc, argv);
  } catch (const BadSettings& error) {
    return report(error.what(), kExitSettings, patience_of_others());
  } catch (const PeerLost& error) {
    return report(error.what(), kExitRestart, std::chrono::milliseconds(3000));
  } catch (const std::exception& error) {
    return report(error.what(), 1, patience_of_others());
  }
}
