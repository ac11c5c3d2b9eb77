#include "tests/support/training.h"

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <mutex>

#include "core/random.h"
#include "tests/support/in_world.h"

namespace moemamba {

std::string synthetic_tokens(int64_t vocabulary) {
  const std::string path =
      (std::filesystem::temp_directory_path() /
       ("moemamba_tokens_" + std::to_string(getpid()) + "_" + std::to_string(vocabulary) + ".bin"))
          .string();
  if (std::filesystem::exists(path)) return path;
  const Random random(7, "synthetic");
  std::vector<uint16_t> tokens(20000);
  for (size_t i = 0; i < tokens.size(); ++i) {
    const bool noise = i < 2 || random.uniform(i) < 0.2;
    tokens[i] = noise ? uint16_t(random.integer(i + 1'000'000, uint64_t(vocabulary)))
                      : uint16_t((3 * tokens[i - 1] + tokens[i - 2] + 1) % vocabulary);
  }
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(tokens.data()), std::streamsize(tokens.size() * 2));
  return path;
}

TrainerOptions trainer_options(const TrainingCase& c) {
  ModelConfig config;
  config.set_vocabulary(int(c.vocabulary));
  config.set_width(int(c.width));
  config.set_blocks(int(c.blocks));
  config.set_experts(int(c.experts));
  config.set_top_k(int(c.top_k));
  config.set_expert_hidden(int(c.hidden));
  config.set_expert_activation(c.activation);
  config.set_capacity_factor(float(c.capacity_factor));
  config.set_reset_at_documents(c.reset_at_documents);
  config.set_z_loss(c.z_loss);
  config.set_state(8);
  TrainConfig train;
  train.set_steps(c.steps);
  train.set_lr(c.lr);
  TrainerOptions options;
  options.sizes = model_sizes(config, 0);
  options.optimizer = optimizer_settings(train);
  options.data.files = {synthetic_tokens(c.vocabulary)};
  options.data.vocabulary = c.vocabulary;
  options.data.end_of_document = 0;
  options.data.sequence_length = c.length;
  options.data.global_batch = c.batch;
  options.data.seed = 42;
  options.micro_batch = c.micro_batch;
  options.routing_group = c.routing_group;
  options.exchange_rows = c.exchange_rows;
  options.threads = c.threads;
  return options;
}

TrainingResult train(const TrainingCase& c, int ranks, int expert) {
  const TrainerOptions options = trainer_options(c);
  std::vector<TrainingResult> results(static_cast<size_t>(ranks));
  in_world(RankLayout(ranks, expert, int(c.experts)), [&](ProcessGroups& groups) {
    Trainer trainer(groups, options);
    TrainingResult& result = results[size_t(groups.rank)];
    for (int64_t k = 0; k < c.steps; ++k) {
      result.records.push_back(trainer.step(k));
      result.counts.push_back(trainer.expert_counts());
    }
    trainer.wait_weights();
  });
  for (const TrainingResult& result : results)
    for (size_t k = 0; k < result.records.size(); ++k)
      check(result.records[k].loss == results[0].records[k].loss &&
                result.records[k].grad_norm == results[0].records[k].grad_norm,
            "step ", k, ": ranks report different losses");
  return results[0];
}

}  // namespace moemamba
