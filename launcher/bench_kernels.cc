#include "runtime/bench_kernels.h"

#include <CLI/CLI.hpp>
#include <cstdio>

#include "launcher/bench.h"
#include "launcher/launch.h"
#include "launcher/rank.h"

namespace moemamba {

namespace {

struct Options {
  SettingsSource source;
  int64_t repeat = 20;
};

int measure(const Options& options) {
  const Words& model = will_use_gpu(options.source) ? large_model() : small_model();
  const RunConfig config = read_bench_settings(options.source, model, started_ranks());
  const ModelSizes sizes = sizes_of(config);
  const TrainConfig& train = config.train();
  run_rank(config, [&](Rank& rank) {
    Stream stream =
        rank.groups.device == DeviceKind::cuda ? Stream::cuda() : Stream::immediate(rank.threads);
    const BatchShare share = share_of_batch(train.global_batch_size(), train.routing_group(),
                                            train.micro_batch_size(), 0, rank.world.size());
    const KernelBench result = bench_kernels(stream, sizes,
                                             {.sequences = share.micro_batch,
                                              .length = train.sequence_length(),
                                              .repeat = options.repeat});
    if (rank.world.rank() == 0) std::fputs(kernel_bench_text(result).c_str(), stdout);
  });
  return 0;
}

}  // namespace

Command add_bench_kernels(CLI::App& bench, const Words&) {
  auto options = std::make_shared<Options>();
  CLI::App* app = bench.add_subcommand("kernels", "Each operator of a model's step");
  add_repeat_option(*app, options->repeat);
  add_settings_options(*app, options->source);
  app->footer(
      "At the shapes of a micro-batch, beside what this machine copies and multiplies at best.\n"
      "Without --config: on a GPU the paper's 25M model with 32 experts, 64 x 1024 tokens and a\n"
      "vocabulary of 50304, in bf16; on a CPU about the quickstart's. Examples:\n"
      "  moemamba bench kernels --device=CUDA --train.global_batch_size=32\n"
      "  moemamba bench kernels --device=CPU --config configs/quickstart.textproto\n"
      "Everything else on the line is a setting, as in `moemamba train`.");
  return [app, options] {
    take_remaining(*app, options->source);
    return measure(*options);
  };
}

}  // namespace moemamba
