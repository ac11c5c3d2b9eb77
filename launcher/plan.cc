#include <CLI/CLI.hpp>
#include <cmath>
#include <cstdio>

#include "core/gpu.h"
#include "core/schema.h"
#include "launcher/commands.h"
#include "launcher/launch.h"
#include "launcher/machine.h"
#include "launcher/plan_text.h"
#include "launcher/settings.h"

namespace moemamba {

namespace {

struct PlanOptions {
  SettingsSource source;
  int ranks = 1;
  std::string memory;  // of one rank: "80G"; empty: its share of this machine's
  bool json = false;
};

int plan(const PlanOptions& options) {
  const RunConfig config = read_settings(options.source, Purpose::plan, options.ranks);
  const int64_t memory =
      options.memory.empty() ? machine_memory() / options.ranks : read_bytes(options.memory);
  const ModelSizes sizes = sizes_of(config);
  TrainerOptions trainer = trainer_options(sizes, config.parallel(), config.train());
  // bf16 is a GPU's, and so is memory that is given as one's.
  const bool on_gpu = config.device() == RunConfig::CUDA ||
                      (config.device() == RunConfig::AUTO &&
                       (sizes.compute != DType::f32 || !gpu::devices().empty()));
  if (on_gpu) trainer.device = DeviceKind::cuda;
  const Plan made =
      make_plan(trainer,
                RankLayout(options.ranks, config.parallel().expert(), int(sizes.E)), memory);
  std::fputs((options.json ? plan_json(made) : plan_text(made)).c_str(), stdout);
  return made.fits() ? 0 : 1;
}

}  // namespace

Command add_plan(CLI::App& app, const Words&) {
  CLI::App* command =
      app.add_subcommand("plan", "Sizes of a training run, and whether it fits; runs nothing");
  auto options = std::make_shared<PlanOptions>();
  command->add_option("--ranks", options->ranks, "Ranks of the run, 1 to 4096 (default 1)")
      ->type_name("N")
      ->check(CLI::Range(1, kMostPlannedRanks).description(""));
  command
      ->add_option("--gpu-memory,--memory", options->memory,
                   "Memory of one rank: 80G or 80GiB are 2^30 bytes each, 80GB are\n"
                   "10^9; K, M and T likewise (default: this machine's, by the ranks)")
      ->type_name("SIZE")
      ->check([](const std::string& text) {
        return read_bytes(text) > 0 ? std::string()
                                    : concat(text, ": expected a size such as 80G, 512M or 1.5T");
      });
  command->add_flag("--json", options->json, "One JSON object for programs");
  add_settings_options(*command, options->source);
  command->footer(
      "Exit codes: 0 it fits; 1 it does not (what would make it fit is said); 2 settings are "
      "wrong.\n"
      "Example:\n"
      "  moemamba plan --config configs/moe_mamba_25m.textproto --ranks 8 --gpu-memory 80G \\\n"
      "    --parallel.expert=8 --train.routing_group=8\n"
      "Everything else on the line is a setting, as in `moemamba train`.");
  return [command, options] {
    take_remaining(*command, options->source);
    return plan(*options);
  };
}

}  // namespace moemamba
