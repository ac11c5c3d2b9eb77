#pragma once
#include <string>
#include <vector>

#include "launcher/run_config.pb.h"
#include "model/config.h"

namespace CLI {
class App;
}

namespace moemamba {

// Where a command's settings come from.
struct SettingsSource {
  std::vector<std::string> files;    // text format, later ones win
  std::vector<std::string> options;  // "--model.experts=32", or in two words
};

// --config, and every word that no other option of `app` takes.
void add_settings_options(CLI::App& app, SettingsSource& source);
void take_remaining(const CLI::App& app, SettingsSource& source);

// What a configuration must satisfy beyond its ranges.
enum class Purpose {
  show,   // nothing more
  plan,   // sizes that fit each other and the planned ranks
  train,  // token files; sizes that fit each other and the ranks
  use,    // of a trained model: fits the ranks (parallel.expert is made to, if left to the run)
};

// BadSettings lists every problem.
RunConfig read_settings(const SettingsSource& source, Purpose purpose, int ranks);

// Of the model that they describe; the vocabulary is the tokenizer's where they leave it to that.
// BadSettings where they contradict each other.
ModelSizes sizes_of(const RunConfig& config);

// Settings that say how and where a command is run, not what is trained.
bool is_about_the_run(const std::string& setting);

// Where config.run holds a run already, throws an Error unless `config` can go on with it: what
// makes it another run (model, length, batch, seed, sampling) must be as it was. Other settings
// that differ are said on `out` (null: not), unless `quietly`.
void check_goes_on(const RunConfig& config, FILE* out, bool quietly);

// The settings that `folder` was trained with, below those of `source`.
RunConfig read_run_settings(const std::string& folder, const SettingsSource& source, int ranks);

}  // namespace moemamba
