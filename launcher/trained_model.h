#pragma once
#include "launcher/run_config.pb.h"
#include "launcher/settings.h"
#include "runtime/commands.h"

namespace moemamba {

// Options that `evaluate` and `generate` share: which trained model, on how many ranks.
struct TrainedModelOptions {
  SettingsSource source;
  std::string run;      // folder
  std::string weights;  // empty: the run's
  int ranks = 1;
};
void add_trained_model_options(CLI::App& app, TrainedModelOptions& options);
RunConfig read_trained_model(const TrainedModelOptions& options, int ranks);
UseRequest use_request(const RunConfig& config, const TrainedModelOptions& options, int threads);

}  // namespace moemamba
