#include "runtime/bench_tune.h"

#include <CLI/CLI.hpp>
#include <iostream>

#include "core/gpu.h"
#include "launcher/bench.h"
#include "launcher/launch.h"
#include "launcher/rank.h"

namespace moemamba {

namespace {

int tune(const SettingsSource& source) {
  const RunConfig config = read_bench_settings(source, large_model(), started_ranks());
  std::string why;
  check(config.device() != RunConfig::CPU && !gpu::devices(&why).empty(),
        "bench tune: algorithms are tuned on the GPU that will run them; ",
        why.empty() ? "--device=CPU leaves it out" : "no GPU (" + why + ")");
  run_rank(config,
           [&](Rank& rank) { bench_tune(rank.groups, bench_trainer(rank, config), std::cout); });
  return 0;
}

}  // namespace

Command add_bench_tune(CLI::App& bench, const Words&) {
  auto source = std::make_shared<SettingsSource>();
  CLI::App* app = bench.add_subcommand("tune", "Algorithms of a model's products on this GPU");
  add_settings_options(*app, *source);
  app->footer(
      "Takes one step of the model, then times every algorithm that cuBLASLt has for each of its\n"
      "products, and prints lines for kernels/cuda/matmul_table.inc. They count in the next "
      "build:\n"
      "on GPUs of this name and with this cuBLASLt. Without --config the model is that of\n"
      "`moemamba bench kernels` on a GPU. Example:\n"
      "  moemamba bench tune --config configs/moe_mamba_100m.textproto \\\n"
      "    --model.compute_dtype=BF16 >lines.inc\n"
      "Everything else on the line is a setting, as in `moemamba train`.");
  return [app, source] {
    take_remaining(*app, *source);
    return tune(*source);
  };
}

}  // namespace moemamba
