#include "launcher/trained_model.h"

#include <CLI/CLI.hpp>

#include "core/file.h"
#include "launcher/launch.h"

namespace moemamba {

void add_trained_model_options(CLI::App& app, TrainedModelOptions& options) {
  app.add_option("--run", options.run, "Folder of the run that trained the model")
      ->type_name("FOLDER")
      ->required();
  app.add_option("--weights", options.weights,
                 "Other weights of the same shape: a folder or a .safetensors file")
      ->type_name("PATH");
  add_ranks_option(app, options.ranks);
  add_settings_options(app, options.source);
}

RunConfig read_trained_model(const TrainedModelOptions& options, int ranks) {
  RunConfig config = read_run_settings(options.run, options.source, ranks);
  // The run keeps its own copy of a tokenizer, so that it can be moved away from its data.
  const std::string own = join_path(options.run, "tokenizer.model");
  if (file_exists(own)) config.mutable_data()->set_tokenizer(own);
  return config;
}

UseRequest use_request(const RunConfig& config, const TrainedModelOptions& options, int threads) {
  return {.model = config.model(),
          .parallel = config.parallel(),
          .train = config.train(),
          .data = config.data(),
          .weights = options.weights.empty() ? options.run : options.weights,
          .threads = threads};
}

}  // namespace moemamba
