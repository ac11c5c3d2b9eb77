#include "launcher/settings.h"

#include <CLI/CLI.hpp>
#include <cstdio>
#include <map>
#include <numeric>
#include <set>

#include "core/file.h"
#include "core/schema.h"
#include "model/config.h"
#include "runtime/commands.h"
#include "runtime/run_folder.h"

namespace moemamba {

namespace {

std::string divisors_text(int ranks) {
  std::vector<int> divisors;
  for (int d = 1; d <= ranks; ++d)
    if (ranks % d == 0) divisors.push_back(d);
  std::string text;
  for (size_t i = 0; i < divisors.size(); ++i)
    text += concat(i == 0 ? "" : i + 1 == divisors.size() ? " or " : ", ", divisors[i]);
  return text;
}

void check_layout(Settings& settings, const RunConfig& config, Purpose purpose, int ranks) {
  const int expert = config.parallel().expert();
  const int experts = has_routers(config.model()) ? config.model().experts() : 0;
  if (ranks % expert != 0)
    settings.object("parallel.expert",
                    concat("must divide the ", ranks, " ranks that ",
                           purpose == Purpose::plan ? "are planned" : "were started", "; try ",
                           divisors_text(ranks)));
  if (expert > std::max(1, experts))
    settings.object("parallel.expert", concat(expert, " ranks cannot share ", experts,
                                              " experts (model.experts); at least one each"));
}

void check_model(Settings& settings, const ModelConfig& model) {
  for (const ModelProblem& problem : model_problems(model))
    settings.object(problem.setting, problem.text);
}

// Settings without which a run is not the same one any more.
bool makes_another_run(const std::string& setting) {
  static const std::set<std::string> names = {"train.global_batch_size", "train.routing_group",
                                              "train.sequence_length", "train.seed",
                                              "data.sampling"};
  if (setting == "model.compute_dtype") return false;  // weights and moments are f32 anyway
  return setting.rfind("model.", 0) == 0 || names.count(setting) > 0;
}

void check_data(Settings& settings, const RunConfig& config) {
  if (config.data().tokenizer() != "none") return;
  if (config.model().vocabulary() == 0)
    settings.object("model.vocabulary",
                    "data.tokenizer is \"none\": give the number of ids of the tokenizer that made "
                    "the token files (50257 for GPT-2's)");
  if (config.data().sampling() == DataConfig::CIRCULAR)
    settings.object("data.sampling",
                    "CIRCULAR puts an end-of-document id behind every document, and data.tokenizer "
                    "\"none\" has none; take EPOCHS");
}

void check_steps(Settings& settings, const RunConfig& config) {
  const TrainConfig& train = config.train();
  const auto whole_groups = [&](const char* setting, int sequences) {
    if (sequences % train.routing_group() == 0) return;
    // What somebody wrote is to blame, not a default.
    const bool own = !settings.place_of(setting).empty();
    settings.object(own ? setting : "train.routing_group",
                    concat(sequences, " sequences (", setting, ") are not a multiple of the ",
                           train.routing_group(), " of a routing group (train.routing_group)"));
  };
  whole_groups("train.global_batch_size", train.global_batch_size());
  whole_groups("train.micro_batch_size", train.micro_batch_size());
  if (train.sample_tokens() >= train.sequence_length())
    settings.object("train.sample_tokens",
                    concat("must be less than the ", train.sequence_length(),
                           " of a sequence (train.sequence_length), for a prompt comes first; "
                           "found ",
                           train.sample_tokens()));
  if (train.sample_tokens() > 0 && config.data().tokenizer() == "none")
    settings.object("train.sample_tokens",
                    "data.tokenizer \"none\" makes no text of ids; take 0, or give the tokenizer");
  if (train.warmup_steps() > train.steps())
    settings.object("train.warmup_steps",
                    concat("must be at most the ", train.steps(),
                           " steps of the run (train.steps), found ", train.warmup_steps()));
}

void check_training(Settings& settings, const RunConfig& config) {
  check_steps(settings, config);
  if (config.data().train_size() == 0)
    settings.object("data.train",
                    "no token files to train on; give what `moemamba prepare` wrote: "
                    "--data.train=FOLDER/train");
  if (config.run().empty()) settings.object("run", "the run needs a folder; give --run=FOLDER");
}

// The vocabulary where the settings leave it to the tokenizer. One that is set is compared with a
// tokenizer that is there; "bytes", the default, may only mean that none was chosen yet.
int64_t tokenizer_vocabulary(const RunConfig& config) {
  const bool needed = config.model().vocabulary() == 0;
  if (!needed && config.data().tokenizer() == "bytes") return 0;
  try {
    const auto tokenizer = open_tokenizer(config.data().tokenizer());
    return tokenizer ? tokenizer->vocabulary() : 0;
  } catch (const Error& error) {
    if (!needed) return 0;
    throw BadSettings(concat(error.what(), "; or set model.vocabulary"));
  }
}

}  // namespace

ModelSizes sizes_of(const RunConfig& config) {
  const int64_t vocabulary = tokenizer_vocabulary(config);
  try {
    return model_sizes(config.model(), vocabulary, config.train().sequence_length());
  } catch (const Error& error) {
    throw BadSettings(error.what());
  }
}

bool is_about_the_run(const std::string& setting) {
  return setting == "run" || setting == "overwrite" || setting == "init_from" ||
         setting == "train.threads" || setting == "device" || setting == "train.progress" ||
         setting == "train.log_interval" || setting == "train.tensorboard" ||
         setting.rfind("launch.", 0) == 0;
}

void add_settings_options(CLI::App& app, SettingsSource& source) {
  app.add_option("--config", source.files,
                 "File with settings in protobuf text format; repeatable, later\nfiles win")
      ->type_name("FILE")
      ->allow_extra_args(false);
  app.allow_extras();
}

void take_remaining(const CLI::App& app, SettingsSource& source) {
  for (const std::string& word : app.remaining()) {
    const bool open = !source.options.empty() && source.options.back().rfind("--", 0) == 0 &&
                      source.options.back().find('=') == std::string::npos;
    if (open && word.rfind("--", 0) != 0)
      source.options.back() += "=" + word;
    else
      source.options.push_back(word);
  }
}

RunConfig read_settings(const SettingsSource& source, Purpose purpose, int ranks) {
  RunConfig config;
  Settings settings(config);
  for (const std::string& file : source.files) settings.read_file(file);
  for (const std::string& option : source.options) settings.read_option(option);
  if (purpose == Purpose::use && settings.place_of("parallel.expert").rfind("--", 0) != 0)
    config.mutable_parallel()->set_expert(std::gcd(config.parallel().expert(), ranks));
  if (purpose != Purpose::show) {
    check_layout(settings, config, purpose, ranks);
    check_model(settings, config.model());
    check_data(settings, config);
  }
  if (purpose == Purpose::plan) check_steps(settings, config);
  if (purpose == Purpose::train) check_training(settings, config);
  settings.throw_problems();
  return config;
}

void check_goes_on(const RunConfig& config, FILE* out, bool quietly) {
  const std::string file = join_path(config.run(), "config.textproto");
  if (!file_exists(file)) return;
  RunConfig before;
  Settings settings(before);
  settings.read_file(file);
  settings.throw_problems();
  std::map<std::string, std::string> old_values;
  for (auto& [setting, value] : resolved_values(before)) old_values[setting] = value;
  std::string other, changed;
  for (auto& [setting, value] : resolved_values(config)) {
    if (old_values[setting] == value || is_about_the_run(setting)) continue;
    (makes_another_run(setting) ? other : changed) +=
        concat("\n  ", setting, ": ", old_values[setting], " there, ", value, " here");
  }
  check(other.empty(), taken_text(config.run(), "it is another one:" + other));
  if (out && !quietly && !changed.empty())
    std::fprintf(out, "moemamba: going on with other settings than before:%s\n", changed.c_str());
}

RunConfig read_run_settings(const std::string& folder, const SettingsSource& source, int ranks) {
  SettingsSource all = source;
  const std::string file = join_path(folder, "config.textproto");
  if (!file_exists(file))
    throw BadSettings(concat("--run=", folder, ": no run is there (expected ", file,
                             "); give the folder that `moemamba train` wrote"));
  all.files.insert(all.files.begin(), file);
  RunConfig config = read_settings(all, Purpose::use, ranks);
  config.set_run(folder);
  return config;
}

}  // namespace moemamba
