#include <CLI/CLI.hpp>
#include <cstdio>

#include "launcher/commands.h"
#include "launcher/launch.h"
#include "launcher/rank.h"
#include "launcher/trained_model.h"
#include "runtime/baselines.h"
#include "runtime/prepare.h"

namespace moemamba {

namespace {

// What simple models make of the same text, where it lies in one prepared folder.
void print_baselines(const DataConfig& data, int64_t vocabulary, int64_t bytes) {
  if (data.validation_size() != 1 || data.train_size() != 1 || bytes == 0) return;
  const TokenFile train(data.train(0)), held_out(data.validation(0));
  std::printf("bigram model over the same tokens: %.3f bits per byte\n",
              bigram_bits_per_byte(train, held_out, vocabulary, bytes));
  const std::string text = validation_text_path(folder_of(data.validation(0)));
  if (file_exists(text))
    std::printf("gzip -9 of the same text: %.3f bits per byte\n",
                gzip_bits_per_byte(MappedFile(text).text()));
}

void print_evaluation(const RunConfig& config, const Evaluation& evaluation) {
  std::printf("held-out: %lld tokens, loss %.4f", static_cast<long long>(evaluation.tokens),
              evaluation.loss);
  if (evaluation.bits_per_byte) std::printf(", bits per byte %.4f", *evaluation.bits_per_byte);
  std::printf("\n");
  const std::vector<std::string> paths(config.data().validation().begin(),
                                       config.data().validation().end());
  const auto tokenizer = open_tokenizer(config.data().tokenizer());
  print_baselines(config.data(), tokenizer ? tokenizer->vocabulary() : config.model().vocabulary(),
                  open_held_out(paths).bytes);
  if (config.model().experts() > 0)
    std::printf("\n%s", expert_table(evaluation.counts, config.model().experts()).c_str());
  std::fflush(stdout);
}

int evaluate(const TrainedModelOptions& options, const Words& words) {
  const bool launches = must_launch(options.ranks);
  const RunConfig config = read_trained_model(options, launches ? options.ranks : started_ranks());
  if (launches) return launch(options.ranks, words, OnSignal::end);
  run_rank(config, [&](Rank& rank) {
    const Evaluation evaluation =
        run_evaluation(rank.groups, use_request(config, options, rank.threads));
    if (rank.world.rank() == 0) print_evaluation(config, evaluation);
  });
  return 0;
}

}  // namespace

Command add_evaluate(CLI::App& app, const Words& words) {
  CLI::App* command = app.add_subcommand("evaluate", "Held-out loss of a trained model");
  auto options = std::make_shared<TrainedModelOptions>();
  add_trained_model_options(*command, *options);
  command->footer(
      "Settings are the run's; --config and settings change them, for example\n"
      "  moemamba evaluate --run runs/quickstart --data.validation=other/validation\n"
      "Any number of ranks reads what any number has written.");
  return [command, options, &words] {
    take_remaining(*command, options->source);
    return evaluate(*options, words);
  };
}

}  // namespace moemamba
