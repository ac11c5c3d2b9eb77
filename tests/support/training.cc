#include "tests/support/training.h"

#include <google/protobuf/text_format.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>

#include "core/random.h"
#include "tests/support/in_world.h"

namespace moemamba {

namespace {

// Files of this process, removed when it ends.
class TokenFolder {
 public:
  TokenFolder()
      : path_(std::filesystem::temp_directory_path() /
              ("moemamba-tokens-" + std::to_string(getpid()))) {
    std::filesystem::create_directories(path_);
  }
  ~TokenFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

}  // namespace

std::string synthetic_tokens(int64_t vocabulary) {
  static const TokenFolder folder;
  const std::string path = (folder.path() / (std::to_string(vocabulary) + ".bin")).string();
  if (std::filesystem::exists(path)) return path;
  const Random random(7, "synthetic");
  std::vector<uint16_t> tokens(20000);
  for (size_t i = 0; i < tokens.size(); ++i) {
    const double u = random.uniform(i + 1'000'000);
    const bool follows = i > 0 && random.uniform(i) < 0.5;
    tokens[i] = uint16_t(follows ? (5 * tokens[i - 1] + 1) % std::min<int64_t>(16, vocabulary)
                                 : int64_t(double(vocabulary) * u * u * u));
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
  config.set_experts(int(std::max<int64_t>(1, c.experts)));
  if (c.experts == 0) config.add_pattern("mamba");
  config.set_top_k(int(c.top_k));
  config.set_expert_hidden(int(c.hidden));
  config.set_expert_activation(c.activation);
  config.set_capacity_factor(float(c.capacity_factor));
  config.set_reset_at_documents(c.reset_at_documents);
  config.set_z_loss(c.z_loss);
  config.set_state(8);
  check(google::protobuf::TextFormat::MergeFromString(c.model, &config), "not a model: ", c.model);
  TrainConfig train;
  train.set_steps(c.steps);
  train.set_lr(c.lr);
  TrainerOptions options;
  options.sizes = model_sizes(config, 0, c.length);
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

TrainingResult train(const TrainingCase& c, int ranks, int expert, const TrainingHooks& hooks) {
  const TrainerOptions options = trainer_options(c);
  std::vector<TrainingResult> results(static_cast<size_t>(ranks));
  in_world(RankLayout(ranks, expert, int(c.experts)), [&](ProcessGroups& groups) {
    groups.device = c.device;
    if (hooks.wire) hooks.wire(groups);
    Trainer trainer(groups, options);
    if (hooks.start) hooks.start(trainer);
    TrainingResult& result = results[size_t(groups.rank)];
    for (int64_t k = 0; k < c.steps; ++k) {
      result.records.push_back(trainer.step(k));
      result.counts.push_back(trainer.expert_counts());
    }
    trainer.wait_weights();
    if (hooks.end) hooks.end(trainer);
  });
  for (const TrainingResult& result : results)
    for (size_t k = 0; k < result.records.size(); ++k)
      results[0].ranks_agree &= result.records[k].loss == results[0].records[k].loss &&
                                result.records[k].grad_norm == results[0].records[k].grad_norm;
  return results[0];
}

TrainingDifference difference(const TrainingResult& a, const TrainingResult& b) {
  check(a.records.size() == b.records.size(), "trainings of ", a.records.size(), " and ",
        b.records.size(), " steps");
  TrainingDifference worst;
  for (size_t k = 0; k < a.records.size(); ++k) {
    worst.loss =
        std::max(worst.loss, std::abs(a.records[k].loss - b.records[k].loss) / b.records[k].loss);
    for (size_t i = 0; i < a.counts[k].size(); ++i)
      worst.choices += std::abs(a.counts[k][i] - b.counts[k][i]) / 2;
  }
  return worst;
}

std::vector<std::pair<int, int>> layouts(int most_ranks, int64_t experts) {
  std::vector<std::pair<int, int>> list;
  for (int ranks = 2; ranks <= most_ranks; ++ranks)
    for (int expert = 1; expert <= ranks && expert <= experts; ++expert)
      if (ranks % expert == 0) list.emplace_back(ranks, expert);
  return list;
}

}  // namespace moemamba
