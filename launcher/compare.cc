#include <CLI/CLI.hpp>
#include <cstdio>
#include <filesystem>

#include "launcher/commands.h"
#include "launcher/settings.h"
#include "runtime/commands.h"
#include "runtime/compare.h"

namespace moemamba {

namespace {

struct CompareOptions {
  std::vector<std::string> folders;
  std::string output;  // empty: the table alone, on standard output
};

ComparedRun open_run(const std::string& folder) {
  const RunConfig config = read_run_settings(folder, {}, 1);
  int64_t vocabulary = config.model().vocabulary();
  if (vocabulary == 0)
    if (const auto tokenizer = open_tokenizer(config.data().tokenizer()))
      vocabulary = tokenizer->vocabulary();
  const ModelSizes sizes =
      model_sizes(config.model(), vocabulary, config.train().sequence_length());
  const auto path = std::filesystem::path(folder).lexically_normal();
  const auto name = path.has_filename() ? path.filename() : path.parent_path().filename();
  return {.name = name.string(), .folder = folder, .counts = count_model(sizes)};
}

int compare(const CompareOptions& options) {
  std::vector<ComparedRun> runs;
  for (const std::string& folder : options.folders) runs.push_back(open_run(folder));
  const std::string table = comparison_table(runs);
  std::fputs(table.c_str(), stdout);
  if (options.output.empty()) return 0;
  PosixFileSystem files;
  files.make_folders(options.output);
  write_file(files, join_path(options.output, "comparison.md"), table);
  write_file(files, join_path(options.output, "comparison.svg"), comparison_svg(runs));
  std::fprintf(stderr, "%s and comparison.svg\n",
               join_path(options.output, "comparison.md").c_str());
  return 0;
}

}  // namespace

Command add_compare(CLI::App& app, const Words&) {
  CLI::App* command = app.add_subcommand("compare", "Put the held-out losses of runs side by side");
  auto options = std::make_shared<CompareOptions>();
  command->add_option("runs", options->folders, "Folders of runs; the first one is the measure")
      ->type_name("FOLDER")
      ->required();
  command
      ->add_option("--output", options->output,
                   "Folder for comparison.md (the table) and comparison.svg (the curves)")
      ->type_name("FOLDER");
  command->footer(
      "Prints a Markdown table: parameters, held-out loss and bits per byte after the last step,\n"
      "speed, and after how many steps each run was as good as the first one in the end.\n"
      "Example: moemamba compare --output runs/comparison runs/mamba runs/moe_mamba");
  return [options] { return compare(*options); };
}

}  // namespace moemamba
