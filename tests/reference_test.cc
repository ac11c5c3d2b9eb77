// The trainer against tests/reference: a PyTorch program written from the formulas alone. Each
// fixture holds a system's settings, first weights and tokens, and what PyTorch makes of them.
#include <google/protobuf/text_format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>

#include "core/host_mirror.h"
#include "runtime/safetensors.h"
#include "runtime/trainer.h"
#include "tests/support/harness.h"
#include "tests/support/in_world.h"
#include "tests/support/temporary_folder.h"

namespace moemamba {
namespace {

namespace fs = std::filesystem;

// Relative to the value; to the gradient's norm; margins of choices that must be the same.
constexpr double kFirstLossBound = 1e-6, kLossBound = 1e-4, kGradientBound = 2e-5;
constexpr float kMargin = 1e-5f;

class Fixture {
 public:
  explicit Fixture(const fs::path& path) : reader_(path.string()) {
    check(google::protobuf::TextFormat::ParseFromString(reader_.metadata().at("model"), &model),
          path.string(), ": cannot read the model's settings");
    check(google::protobuf::TextFormat::ParseFromString(reader_.metadata().at("train"), &train),
          path.string(), ": cannot read the training's settings");
  }
  template <class T>
  std::vector<T> values(const std::string& name) const {
    const StoredTensor* stored = reader_.find(name);
    check(stored != nullptr && stored->dtype == dtype_of<T>(), reader_.path(), ": no ", name);
    const auto* data = reinterpret_cast<const T*>(reader_.data(*stored));
    return {data, data + stored->shape.elements()};
  }
  bool has(const std::string& name) const { return reader_.find(name) != nullptr; }
  // Names of tensors whose values are init/...
  std::vector<std::string> weights() const {
    std::vector<std::string> names;
    for (const StoredTensor& t : reader_.tensors())
      if (t.name.starts_with("init/")) names.push_back(t.name.substr(5));
    return names;
  }
  ModelConfig model;
  TrainConfig train;

 private:
  SafetensorsReader reader_;
};

std::vector<fs::path> fixtures() {
  std::vector<fs::path> paths;
  for (const auto& entry :
       fs::directory_iterator(fs::path(MOEMAMBA_SOURCE_DIR) / "tests/reference/fixtures"))
    if (entry.path().extension() == ".safetensors") paths.push_back(entry.path());
  std::sort(paths.begin(), paths.end());
  return paths;
}

TrainerOptions options_of(const Fixture& fixture, const std::string& token_file) {
  const TrainConfig& train = fixture.train;
  TrainerOptions options;
  options.sizes = model_sizes(fixture.model, 0, train.sequence_length());
  options.optimizer = optimizer_settings(train);
  options.data.files = {token_file};
  options.data.vocabulary = options.sizes.V;
  options.data.end_of_document = 0;
  options.data.sequence_length = train.sequence_length();
  options.data.global_batch = train.global_batch_size();
  options.data.sampling = Sampling::in_order;
  options.micro_batch = train.micro_batch_size();
  options.routing_group = train.routing_group();
  return options;
}

// The tokens as nanoGPT stores them: 16 bits each.
std::string write_tokens(const TemporaryFolder& folder, const Fixture& fixture) {
  const std::vector<int32_t> tokens = fixture.values<int32_t>("tokens");
  const std::vector<uint16_t> narrow(tokens.begin(), tokens.end());
  const std::string path = folder / "tokens.bin";
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(narrow.data()), std::streamsize(narrow.size() * 2));
  return path;
}

// Every tensor of the model by name, all experts among them (one rank holds everything).
std::map<std::string, Tensor> tensors_of(const ParameterStore& store, bool gradients) {
  std::map<std::string, Tensor> tensors;
  for (const Parameter& p : store.parameters()) {
    const Tensor all = gradients ? p.gradient : p.value;
    const size_t at = p.name.find("{}");
    if (at == std::string::npos) {
      tensors[p.name] = all;
      continue;
    }
    const int64_t rows = p.shape.rows() / p.shape[0];
    for (int64_t e = 0; e < p.shape[0]; ++e)
      tensors[p.name.substr(0, at) + std::to_string(e) + p.name.substr(at + 2)] =
          all.row_range(e * rows, (e + 1) * rows);
  }
  if (!gradients)
    for (const Parameter& state : store.states()) tensors[state.name] = state.value;
  return tensors;
}

void set_weights(const Fixture& fixture, ParameterStore& store) {
  HostMirror mirror(store.groups().device);
  const auto tensors = tensors_of(store, false);
  std::vector<std::string> own;
  for (const auto& [name, tensor] : tensors) own.push_back(name);
  std::vector<std::string> theirs = fixture.weights();
  std::sort(theirs.begin(), theirs.end());
  ASSERT_EQ(own, theirs);
  for (const auto& [name, tensor] : tensors) {
    const std::vector<float> values = fixture.values<float>("init/" + name);
    ASSERT_EQ(int64_t(values.size()), tensor.elements()) << name;
    const Tensor host = mirror.blank(tensor);
    std::copy(values.begin(), values.end(), static_cast<float*>(host.data));
    mirror.write_back(host, tensor);
  }
  store.values_changed();
}

// The gradients of step 0, which the optimizer leaves alone on a single rank.
void expect_gradients(const Fixture& fixture, const ParameterStore& store) {
  HostMirror mirror(store.groups().device);
  for (const auto& [name, tensor] : tensors_of(store, true)) {
    const std::vector<float> expected = fixture.values<float>("grad/" + name);
    const auto* found = static_cast<const float*>(mirror.read(tensor).data);
    double norm = 0, difference = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
      norm += double(expected[i]) * expected[i];
      difference += std::pow(double(found[i]) - expected[i], 2);
    }
    EXPECT_LE(std::sqrt(difference), kGradientBound * std::sqrt(norm)) << name;
  }
}

// Choices of the whole first batch, router by router; returns how many had a margin.
int64_t expect_choices(const Fixture& fixture, const LanguageModel::Saved& saved,
                       const ModelSizes& sizes) {
  std::vector<const Router::Saved*> routers;
  for (const auto& block : saved.blocks)
    for (const SubLayer::Saved& sub : block)
      for (const AnySaved& layer : sub.layers) {
        if (const auto* moe = std::get_if<MoE::Saved>(&layer)) routers.push_back(&moe->routing);
        const auto* inner = std::get_if<InnerMoE::Saved>(&layer);
        if (!inner) continue;
        for (const Router::Saved* routing :
             {&inner->routing, &inner->conv.routing, &inner->gate.routing, &inner->out.routing})
          if (routing->expert) routers.push_back(routing);
      }
  EXPECT_EQ(int64_t(routers.size()), sizes.routers());
  const std::vector<int32_t> expected = fixture.values<int32_t>("experts");
  const std::vector<float> margins = fixture.values<float>("margins");
  int64_t compared = 0;
  const int64_t T = int64_t(margins.size()) / sizes.routers();
  HostMirror mirror(routers.empty() ? DeviceKind::cpu : routers[0]->expert.device);
  for (size_t r = 0; r < routers.size(); ++r) {
    const Tensor chosen = mirror.read(routers[r]->expert);
    for (int64_t t = 0; t < T; ++t) {
      if (margins[r * size_t(T) + size_t(t)] < kMargin) continue;
      ++compared;
      for (int64_t k = 0; k < sizes.K; ++k)
        EXPECT_EQ(chosen.row<int32_t>(t)[k],
                  expected[(r * size_t(T) + size_t(t)) * size_t(sizes.K) + size_t(k)])
            << "router " << r << ", token " << t << ", choice " << k;
    }
  }
  return compared;
}

void expect_as_the_reference(const fs::path& path, DeviceKind device) {
  const Fixture fixture(path);
  TemporaryFolder folder;
  const TrainerOptions options = options_of(fixture, write_tokens(folder, fixture));
  in_world(RankLayout(1, 1, int(options.sizes.E)), [&](ProcessGroups& groups) {
    groups.device = device;
    Trainer trainer(groups, options);
    ASSERT_NO_FATAL_FAILURE(set_weights(fixture, trainer.session().store));
    const std::vector<double> first = fixture.values<double>("loss0");
    const std::vector<double> losses = fixture.values<double>("losses");
    for (int64_t k = 0; k < int64_t(losses.size()); ++k) {
      const StepRecord record = trainer.step(k);
      trainer.session().compute.synchronize();
      EXPECT_FALSE(trainer.skipped()) << "step " << k;
      if (k > 0) {
        EXPECT_NEAR(record.loss, losses[size_t(k)], kLossBound * losses[size_t(k)]) << "step " << k;
        continue;
      }
      EXPECT_NEAR(record.loss, first[0], kFirstLossBound * first[0]);
      EXPECT_NEAR(record.ce, first[1], kFirstLossBound * first[1]);
      EXPECT_NEAR(record.balance_loss, first[2], kFirstLossBound * first[0]);
      expect_gradients(fixture, trainer.session().store);
      // Only the last micro-batch's choices are still there.
      if (options.sizes.E > 0 && trainer.share().micro_batches == 1) {
        EXPECT_GT(expect_choices(fixture, trainer.session().saved, options.sizes), 0);
      }
    }
  });
}

TEST(Reference, EverySystemTrainsAsPyTorchComputesIt) {
  int64_t count = 0;
  for (const fs::path& path : fixtures()) {
    SCOPED_TRACE(path.stem().string());
    expect_as_the_reference(path, DeviceKind::cpu);
    ++count;
  }
  EXPECT_GE(count, 30);
  RecordProperty("fixtures", int(count));
}

TEST(Reference, EverySystemTrainsOnTheGpuAsPyTorchComputesIt) {
  if (!other_backend()) return;  // the last line says that nothing was compared
  for (const fs::path& path : fixtures()) {
    SCOPED_TRACE(path.stem().string());
    expect_as_the_reference(path, DeviceKind::cuda);
    count_comparison();
  }
}

}  // namespace
}  // namespace moemamba
