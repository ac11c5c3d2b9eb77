#include "runtime/bench_exchange.h"

#include <CLI/CLI.hpp>
#include <cstdio>

#include "core/schema.h"
#include "launcher/bench.h"
#include "launcher/launch.h"
#include "launcher/rank.h"

namespace moemamba {

namespace {

struct Options {
  SettingsSource source;
  int ranks = 1;
  ExchangeBenchOptions exchange;
};

// All ranks share the experts, unless the line says otherwise.
RunConfig read(const Options& options, int ranks) {
  SettingsSource source = options.source;
  source.options.insert(source.options.begin(), concat("--parallel.expert=", ranks));
  const RunConfig config = read_bench_settings(
      source, will_use_gpu(options.source) ? large_model() : small_model(), ranks);
  if (!has_routers(config.model()))
    throw BadSettings("model.pattern: a model without experts exchanges nothing");
  if (config.parallel().expert() < 2)
    throw BadSettings(
        "bench exchange: one rank has all experts, and nothing leaves it; start two "
        "or more: --ranks 2");
  return config;
}

int measure(const Options& options, const Words& words) {
  const bool launches = must_launch(options.ranks);
  const RunConfig config = read(options, launches ? options.ranks : started_ranks());
  const ModelSizes sizes = sizes_of(config);
  if (launches) return launch(options.ranks, words, OnSignal::end);
  run_rank(config, [&](Rank& rank) {
    ExchangeBenchOptions exchange = options.exchange;
    exchange.exchange_rows = config.parallel().exchange_rows();
    exchange.threads = rank.threads;
    const ExchangeBench result = bench_exchange(rank.groups, sizes, exchange);
    if (rank.world.rank() == 0) std::fputs(exchange_bench_text(result).c_str(), stdout);
  });
  return 0;
}

}  // namespace

Command add_bench_exchange(CLI::App& bench, const Words& words) {
  auto options = std::make_shared<Options>();
  CLI::App* app = bench.add_subcommand("exchange", "Rows on their way to experts and back");
  add_ranks_option(*app, options->ranks);
  app->add_option("--megabytes", options->exchange.megabytes,
                  "That leave a rank (default 1,4,16,32,64,256)")
      ->type_name("MB")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->check(CLI::Range(0.001, 16384.0).description(""));
  add_repeat_option(*app, options->exchange.repeat);
  add_settings_options(*app, options->source);
  app->footer(
      "Between GPUs (NCCL) or CPUs (MPI), for tokens that are spread evenly and for all of them "
      "to\n"
      "one expert, beside a plain all-to-all of the same bytes. Without --config rows are those "
      "of\n"
      "`moemamba bench kernels`. Example:\n"
      "  moemamba bench exchange --ranks 2 --megabytes 16,64 --model.width=1024\n"
      "Everything else on the line is a setting, as in `moemamba train`.");
  return [app, options, &words] {
    take_remaining(*app, options->source);
    return measure(*options, words);
  };
}

}  // namespace moemamba
