#include "launcher/bench.h"

#include <CLI/CLI.hpp>
#include <filesystem>

#include "core/gpu.h"
#include "launcher/launch.h"
#include "launcher/rank.h"
#include "runtime/bench_step.h"

namespace moemamba {

namespace {

// Token files of the settings, or one of ours in the temporary folder, written once and kept.
std::vector<std::string> token_files(const RunConfig& config, int64_t vocabulary, int64_t needed) {
  if (config.data().train_size() > 0)
    return {config.data().train().begin(), config.data().train().end()};
  const std::string stem =
      (std::filesystem::temp_directory_path() / concat("moemamba-zipf-", vocabulary, "-", needed))
          .string();
  PosixFileSystem files;
  if (!file_exists(stem + ".idx")) write_zipf_tokens(files, stem, vocabulary, needed);
  return {stem};
}

}  // namespace

void add_repeat_option(CLI::App& app, int64_t& repeat) {
  app.add_option("--repeat", repeat, "Runs of which the median is taken (default 20)")
      ->type_name("N")
      ->check(CLI::Range(1, 1000000).description(""));
}

const Words& small_model() {
  static const Words options = {
      "--model.vocabulary=4096", "--model.width=192",           "--model.blocks=4",
      "--model.experts=8",       "--train.global_batch_size=8", "--train.sequence_length=256"};
  return options;
}

const Words& large_model() {
  static const Words options = {
      "--model.vocabulary=50304",     "--model.width=512",           "--model.blocks=8",
      "--model.experts=32",           "--model.expert_hidden=1536",  "--model.compute_dtype=BF16",
      "--train.global_batch_size=64", "--train.sequence_length=1024"};
  return options;
}

RunConfig read_bench_settings(const SettingsSource& source, const Words& model, int ranks) {
  SettingsSource all = source;
  if (all.files.empty()) all.options.insert(all.options.begin(), model.begin(), model.end());
  return read_settings(all, Purpose::use, ranks);
}

bool will_use_gpu(const SettingsSource& source) {
  const RunConfig config = read_settings(source, Purpose::show, 1);
  return config.device() != RunConfig::CPU && !gpu::devices().empty();
}

TrainerOptions bench_trainer(Rank& rank, const RunConfig& config) {
  const ModelSizes sizes = sizes_of(config);
  TrainerOptions trainer = trainer_options(sizes, config.parallel(), config.train());
  const int64_t batch = trainer.data.global_batch * (trainer.data.sequence_length + 1);
  const int64_t needed = std::max<int64_t>(1 << 22, 4 * batch);
  if (rank.world.rank() == 0) token_files(config, sizes.V, needed);
  Stream host = Stream::immediate();
  barrier(*rank.groups.control, host);
  trainer.data.files = token_files(config, sizes.V, needed);
  trainer.threads = rank.threads;
  return trainer;
}

Command add_bench(CLI::App& app, const Words& words) {
  CLI::App* bench = app.add_subcommand("bench", "Measure this machine");
  bench->require_subcommand(1);
  const std::vector<std::pair<std::string, Command>> commands = {
      {"step", add_bench_step(*bench, words)},
      {"kernels", add_bench_kernels(*bench, words)},
      {"exchange", add_bench_exchange(*bench, words)},
      {"checkpoint", add_bench_checkpoint(*bench, words)},
      {"tune", add_bench_tune(*bench, words)}};
  return [bench, commands] {
    for (const auto& [name, command] : commands)
      if (bench->got_subcommand(name)) return command();
    return kExitSettings;
  };
}

}  // namespace moemamba
