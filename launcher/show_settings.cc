#include <CLI/CLI.hpp>
#include <cstdio>

#include "core/schema.h"
#include "launcher/build_facts.h"
#include "launcher/commands.h"
#include "launcher/settings.h"

namespace moemamba {

Command add_settings(CLI::App& app, const Words&) {
  CLI::App* command = app.add_subcommand(
      "settings", "Print the reference of all settings, or what they resolve to");
  auto source = std::make_shared<SettingsSource>();
  add_settings_options(*command, *source);
  command->footer(
      "Without --config and settings: the reference page, as Markdown.\n"
      "With them: all settings as they resolve, in text format.");
  return [command, source] {
    take_remaining(*command, *source);
    const std::string text = source->files.empty() && source->options.empty()
                                 ? reference_page(run_config_descriptors(), "moemamba.RunConfig")
                                 : resolved_text(read_settings(*source, Purpose::show, 1));
    std::fputs(text.c_str(), stdout);
    return 0;
  };
}

}  // namespace moemamba
