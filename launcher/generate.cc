#include <CLI/CLI.hpp>
#include <cstdio>

#include "launcher/commands.h"
#include "launcher/launch.h"
#include "launcher/rank.h"
#include "launcher/trained_model.h"

namespace moemamba {

namespace {

struct GenerateOptions {
  TrainedModelOptions model;
  SamplingOptions sampling;
  std::string prompt = "\n";
};

int generate(const GenerateOptions& options, const Words& words) {
  const bool launches = must_launch(options.model.ranks);
  const RunConfig config =
      read_trained_model(options.model, launches ? options.model.ranks : started_ranks());
  if (launches) return launch(options.model.ranks, words, OnSignal::end);
  run_rank(config, [&](Rank& rank) {
    run_generation(rank.groups, use_request(config, options.model, rank.threads), options.prompt,
                   options.sampling, stdout);
  });
  return 0;
}

}  // namespace

Command add_generate(CLI::App& app, const Words& words) {
  CLI::App* command = app.add_subcommand("generate", "Write text with a trained model");
  auto options = std::make_shared<GenerateOptions>();
  SamplingOptions& sampling = options->sampling;
  add_trained_model_options(*command, options->model);
  command->add_option("--prompt", options->prompt, "Text to continue (default: a new line)")
      ->type_name("TEXT");
  command->add_option("--tokens", sampling.tokens, "Tokens to write at most (default 200)")
      ->type_name("N")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 40).description(""));
  command
      ->add_option("--temperature", sampling.temperature,
                   "Flattens (above 1) or sharpens the choice (default 1); 0: the likeliest")
      ->type_name("X")
      ->check(CLI::Range(0.0, 100.0).description(""));
  command->add_option("--top-k", sampling.top_k, "Choose among the K likeliest (default 0: all)")
      ->type_name("K")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 24).description(""));
  command
      ->add_option("--top-p", sampling.top_p,
                   "Choose among the fewest tokens that are this likely together (default 1)")
      ->type_name("P")
      ->check(CLI::Range(1e-6, 1.0).description(""));
  command->add_option("--seed", sampling.seed, "The same seed, the same text (default 42)")
      ->type_name("N");
  command->footer(
      "The prompt and what follows it go to standard output. Time and memory per token do not "
      "grow.\n"
      "Example: moemamba generate --run runs/mine --prompt \"It was\" --temperature 0.8 --top-p "
      "0.95");
  return [command, options, &words] {
    take_remaining(*command, options->model.source);
    return generate(*options, words);
  };
}

}  // namespace moemamba
