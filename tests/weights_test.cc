#include "runtime/weights.h"

#include <gtest/gtest.h>

#include <filesystem>

#include "runtime/model_kind.h"
#include "runtime/safetensors.h"
#include "tests/support/cases.h"
#include "tests/support/faulty_files.h"
#include "tests/support/in_world.h"
#include "tests/support/systems.h"
#include "tests/support/temporary_folder.h"
#include "tests/support/training.h"

namespace moemamba {
namespace {

namespace fs = std::filesystem;

ModelSizes sizes_of(int64_t experts, int64_t width = 12) {
  return trainer_options(
             {.experts = experts, .width = width, .hidden = 7, .activation = ModelConfig::SWIGLU})
      .sizes;
}

// A model that is there to hold weights.
struct Holder {
  ParameterStore store;
  LanguageModel model;

  Holder(ProcessGroups& groups, const ModelSizes& sizes, uint64_t seed)
      : store(groups), model(sizes, store, groups.layout, groups.rank) {
    store.allocate(ParameterStore::Memory::values);
    store.initialise(seed);
  }
  // Names whose values are not, bit for bit, those that `seed` initialises.
  std::string wrong(ProcessGroups& groups, const ModelSizes& sizes, uint64_t seed) const {
    const Holder expected(groups, sizes, seed);
    const auto found = store.named_tensors(), wanted = expected.store.named_tensors();
    std::string names;
    for (size_t i = 0; i < wanted.size(); ++i)
      if (to_doubles(found[i].value) != to_doubles(wanted[i].value)) names += found[i].name + " ";
    return names;
  }
};

void save(const std::string& folder, const ModelSizes& sizes, int ranks, int expert,
          uint64_t seed = 1) {
  in_world(RankLayout(ranks, expert, int(sizes.E)), [&](ProcessGroups& groups) {
    Holder holder(groups, sizes, seed);
    Stream stream = Stream::immediate();
    PosixFileSystem files;
    save_weights(files, folder, holder.store, groups, stream, {{"config", "experts: 42"}}, 17);
  });
}

void expect_loads(const std::string& path, const ModelSizes& sizes, int ranks, int expert,
                  uint64_t seed = 1) {
  in_world(RankLayout(ranks, expert, int(sizes.E)), [&](ProcessGroups& groups) {
    Holder holder(groups, sizes, 99);
    load_weights(path, holder.store, groups);
    EXPECT_EQ(holder.wrong(groups, sizes, seed), "") << ranks << " ranks, " << expert;
  });
}

std::string refusal(const std::string& path, const ModelSizes& sizes) {
  std::string message;
  in_world(RankLayout(1, 1, int(sizes.E)), [&](ProcessGroups& groups) {
    Holder holder(groups, sizes, 99);
    message = message_of([&] { load_weights(path, holder.store, groups); });
    EXPECT_EQ(holder.wrong(groups, sizes, 99), "") << "something was read before the refusal";
  });
  return message;
}

TEST(Weights, OfAnyLayoutAreReadByAnyOther) {
  TemporaryFolder folder;
  const ModelSizes sizes = sizes_of(42);
  for (auto [ranks, expert] : {std::pair{1, 1}, {2, 1}, {2, 2}, {3, 3}, {4, 2}, {4, 4}}) {
    const std::string path = folder / ("from_" + std::to_string(ranks * 10 + expert));
    save(path, sizes, ranks, expert);
    expect_loads(path, sizes, 1, 1);
    for (auto [readers, readers_expert] : layouts(4, 42))
      expect_loads(path, sizes, readers, readers_expert);
  }
}

TEST(Weights, OfEverySystemAreReadByOtherLayouts) {
  for (const System& system : kSystems) {
    SCOPED_TRACE(system.name);
    TemporaryFolder folder;
    const ModelSizes sizes = trainer_options({.model = system.model}).sizes;
    save(folder / "w", sizes, 4, sizes.E ? 4 : 1);
    expect_loads(folder / "w", sizes, 3, sizes.E ? 3 : 1);
  }
}

TEST(Weights, CarryTheBiasesOfRouters) {
  TemporaryFolder folder;
  const ModelSizes sizes = trainer_options({.model = "router_bias_rate: 0.01"}).sizes;
  const auto biases = [](const Holder& holder) {
    std::vector<double> all;
    for (const Parameter& state : holder.store.states())
      for (double value : to_doubles(state.value)) all.push_back(value);
    return all;
  };
  std::vector<double> written;
  in_world(RankLayout(1, 1, 5), [&](ProcessGroups& groups) {
    Holder holder(groups, sizes, 1);
    float next = 0.25f;
    for (const Parameter& state : holder.store.states())
      for (int64_t e = 0; e < sizes.E; ++e) state.value.as<float>()[e] = next += 1;
    written = biases(holder);
    Stream stream = Stream::immediate();
    PosixFileSystem files;
    save_weights(files, folder / "w", holder.store, groups, stream, {}, 1);
  });
  EXPECT_EQ(written.size(), size_t(2 * sizes.E));
  in_world(RankLayout(2, 2, 5), [&](ProcessGroups& groups) {
    Holder holder(groups, sizes, 2);
    load_weights(folder / "w", holder.store, groups);
    EXPECT_EQ(biases(holder), written);
  });
}

TEST(Weights, OfADenseModelAreReadToo) {
  TemporaryFolder folder;
  const ModelSizes sizes = sizes_of(0);
  save(folder / "dense", sizes, 2, 1);
  expect_loads(folder / "dense", sizes, 3, 3);
}

TEST(Weights, HaveOneTensorPerExpertUnderGlobalNamesAndTheirSettings) {
  TemporaryFolder folder;
  save(folder / "w", sizes_of(42), 4, 4);
  EXPECT_TRUE(fs::exists(folder / "w/model.safetensors.index.json"));
  const SafetensorsReader last(folder / "w/model-00004-of-00004.safetensors");
  const StoredTensor* up = last.find("blocks.1.moe.experts.41.up.weight");
  ASSERT_NE(up, nullptr);
  EXPECT_EQ(to_string(up->shape), "[7, 12]");
  EXPECT_EQ(last.find("blocks.1.moe.experts.31.up.weight"), nullptr);
  EXPECT_EQ(last.metadata().at("config"), "experts: 42");
  EXPECT_EQ(last.metadata().at("step"), "17");
}

TEST(Weights, AreFoundByRunFolderByFolderAndByFile) {
  TemporaryFolder folder;
  const ModelSizes sizes = sizes_of(3);
  save(folder / "run/weights", sizes, 1, 1);
  for (const char* path : {"run", "run/weights", "run/weights/model.safetensors"})
    expect_loads(folder / path, sizes, 2, 2);
}

TEST(Weights, OfAnotherModelAreRefusedFieldByField) {
  TemporaryFolder folder;
  save(folder / "w", sizes_of(4), 2, 2);
  const std::string wider = refusal(folder / "w", sizes_of(4, 16));
  for (const char* part :
       {"embedding.weight: [61, 12], the model wants [61, 16]",
        "blocks.1.moe.router.weight: [4, 12], the model wants [4, 16]", "set model.*"})
    EXPECT_NE(wider.find(part), std::string::npos) << wider;

  const std::string more = refusal(folder / "w", sizes_of(5));
  EXPECT_NE(more.find("blocks.0.moe.experts.4.up.weight: missing; the model wants [7, 12]"),
            std::string::npos)
      << more;
  EXPECT_NE(more.find("blocks.0.moe.router.weight: [4, 12], the model wants [5, 12]"),
            std::string::npos);

  const std::string fewer = refusal(folder / "w", sizes_of(3));
  EXPECT_NE(fewer.find("blocks.1.moe.experts.3.down.weight: the model has no such tensor"),
            std::string::npos)
      << fewer;
}

// What check_same_kind says of weights with this metadata; "" = nothing.
std::string objection(const WeightsMetadata& metadata, const ModelConfig& model,
                      const std::optional<Tokenizer>& tokenizer) {
  TemporaryFolder folder;
  PosixFileSystem files;
  SafetensorsWriter(files, folder / "model.safetensors", {}, metadata).commit();
  try {
    check_same_kind(folder.path(), model, tokenizer);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(Weights, OfAnotherKindAreRefusedSettingBySetting) {
  const Tokenizer bytes = Tokenizer::bytes();
  ModelConfig trained;
  trained.set_top_k(2);
  const WeightsMetadata kind = describe_kind(trained, bytes);
  EXPECT_EQ(objection(kind, trained, bytes), "");
  ModelConfig other = trained;
  other.set_top_k(3);
  other.set_norm_eps(1e-3f);
  other.set_expert_activation(ModelConfig::GELU);
  other.set_renormalise(true);
  const std::string text = objection(kind, other, bytes);
  for (const char* part :
       {"model.top_k: 2 there, 3 here", "model.expert_activation: RELU there, GELU here",
        "model.norm_eps: 1e-05 there, 0.001 here", "model.renormalise: false there, true here",
        "set model.* and data.tokenizer as in the config.textproto"})
    EXPECT_NE(text.find(part), std::string::npos) << part << "\nin\n" << text;
  EXPECT_EQ(text.find("model.width"), std::string::npos) << text;
}

TEST(Weights, GoOnWithOtherSettingsOfTrainingAndWithWrittenOutSizes) {
  const WeightsMetadata kind = describe_kind(ModelConfig(), Tokenizer::bytes());
  ModelConfig model;
  model.set_capacity_factor(1.5);
  model.set_balance_loss(0.5);
  model.set_z_loss(0.5);
  model.set_init_scale(3);
  model.set_reset_at_documents(true);
  model.set_vocabulary(257);
  model.set_expert_hidden(3 * 192);
  EXPECT_EQ(objection(kind, model, Tokenizer::bytes()), "");
}

TEST(Weights, OfAnotherTokenizerAreRefusedWhereBothHaveOne) {
  const WeightsMetadata kind = describe_kind({}, Tokenizer::bytes());
  WeightsMetadata other = kind;
  other["tokenizer"] = "bpe, vocabulary 257, sha256 00";
  EXPECT_NE(objection(other, {}, Tokenizer::bytes())
                .find("tokenizer: bpe, vocabulary 257, sha256 00 there, bytes, vocabulary 257, "),
            std::string::npos);
  EXPECT_EQ(objection(other, {}, {}), "");
  EXPECT_EQ(objection(describe_kind({}, {}), {}, Tokenizer::bytes()), "");
}

TEST(Weights, WithoutWordsOfTheirKindAreTakenAsTheyAre) {
  ModelConfig model;
  model.set_top_k(7);
  EXPECT_EQ(objection({}, model, Tokenizer::bytes()), "");
  EXPECT_EQ(objection({{"model", "of_the_future: 3 top_k: 7"}}, model, Tokenizer::bytes()), "");
}

TEST(Weights, ThatAreNotThereOrNotWholeAreRefused) {
  TemporaryFolder folder;
  const ModelSizes sizes = sizes_of(4);
  EXPECT_NE(refusal(folder / "nothing", sizes).find("no weights here"), std::string::npos);
  save(folder / "w", sizes, 2, 2);
  fs::remove(folder / "w/model-00002-of-00002.safetensors");
  EXPECT_NE(refusal(folder / "w", sizes).find("model-00002-of-00002"), std::string::npos);
  folder.put("w/model.safetensors.index.json", "{\"weight_map\": {\"a\": \"../../secret\"}}");
  EXPECT_NE(refusal(folder / "w", sizes).find("leaves the folder"), std::string::npos);
  folder.put("w/model.safetensors.index.json", "[");
  EXPECT_NE(refusal(folder / "w", sizes).find("not an index"), std::string::npos);
}

TEST(Weights, OfAnIndexAreFilesOfItsFolder) {
  TemporaryFolder folder;
  const ModelSizes sizes = sizes_of(4);
  save(folder / "w", sizes, 1, 1);
  fs::rename(folder / "w/model.safetensors", folder / "outside");
  fs::create_symlink("../outside", folder / "w/link");
  const std::pair<const char*, const char*> cases[] = {
      {"../outside", "the file ../outside leaves the folder; expected files beside the index"},
      {"/etc/passwd", "leaves the folder"},
      {"link", "w/link: is a symlink; expected the file itself: copy what it points to (cp -L)"},
      {"..", "a file is called \"..\"; expected letters, digits, '.', '_' and '-', at most 128"},
      {"link\\u0000", "a file is called"},
      {"", "a file is called \"\""}};
  for (const auto& [name, expected] : cases) {
    folder.put("w/model.safetensors.index.json",
               concat("{\"weight_map\": {\"a\": \"", name, "\"}}"));
    const std::string message = refusal(folder / "w", sizes);
    EXPECT_NE(message.find(expected), std::string::npos) << message;
  }
  folder.put("w/model.safetensors.index.json", "{\"weight_map\": {}}");
  EXPECT_NE(refusal(folder / "w", sizes).find("expected \"weight_map\": {TENSOR: FILE, ...}"),
            std::string::npos);
  fs::remove(folder / "w/model.safetensors.index.json");  // what the user names may be a link
  fs::create_symlink("../outside", folder / "w/model.safetensors");
  EXPECT_NO_THROW(read_weights_metadata(folder / "w"));
}

// The disk fails at every operation in turn: what is then found is the old or the new weights.
void expect_all_or_nothing(int ranks, int expert, bool replace) {
  const ModelSizes sizes = sizes_of(4);
  TemporaryFolder folder;
  bool done = false;
  for (int64_t left = 0; !done; ++left) {
    const std::string path = folder / (std::to_string(left) + "/weights");
    if (replace) save(path, sizes, ranks, expert, 1);
    done = true;
    try {
      in_world(RankLayout(ranks, expert, 4), [&](ProcessGroups& groups) {
        Holder holder(groups, sizes, 2);
        Stream stream = Stream::immediate();
        FaultyFiles faulty(groups.rank == 0 ? left : 1 << 30);
        save_weights(faulty, path, holder.store, groups, stream, {}, 1);
      });
    } catch (const Error&) {
      done = false;
    }
    ASSERT_LT(left, 1000);
    in_world(RankLayout(1, 1, 4), [&](ProcessGroups& groups) {
      Holder holder(groups, sizes, 99);
      if (!replace && !done && !fs::exists(path)) return;  // nothing is there: fine
      load_weights(folder / std::to_string(left), holder.store, groups);
      const bool is_new = holder.wrong(groups, sizes, 2).empty();
      const bool is_old = holder.wrong(groups, sizes, 1).empty();
      EXPECT_TRUE(is_new || (replace && is_old && !done)) << left;
    });
    save(path, sizes, ranks, expert, 3);  // and the next time all is well
    expect_loads(folder / std::to_string(left), sizes, 1, 1, 3);
  }
}

TEST(Weights, AppearWholeOrNotAtAll) {
  expect_all_or_nothing(1, 1, false);
  expect_all_or_nothing(2, 2, false);
}

TEST(Weights, AreReplacedAtOnce) {
  expect_all_or_nothing(1, 1, true);
  expect_all_or_nothing(2, 2, true);
}

// One operation of one rank fails, each in turn; the disk is well again when rank 0 cleans up.
void expect_nothing_left_behind(int ranks, int expert, int failing) {
  const ModelSizes sizes = sizes_of(4);
  TemporaryFolder folder;
  bool done = false;
  for (int64_t left = 0; !done; ++left) {
    ASSERT_LT(left, 1000);
    const std::string path = folder / (std::to_string(left) + "/weights");
    save(path, sizes, ranks, expert, 1);
    done = true;
    try {
      in_world(RankLayout(ranks, expert, 4), [&](ProcessGroups& groups) {
        Holder holder(groups, sizes, 2);
        Stream stream = Stream::immediate();
        FaultyFiles faulty(groups.rank == failing ? left : 1 << 30);
        faulty.refusals = 1;
        save_weights(faulty, path, holder.store, groups, stream, {}, 1);
      });
    } catch (const Error&) {
      done = false;
    }
    std::string found;
    for (const auto& entry : fs::directory_iterator(folder / std::to_string(left)))
      found += entry.path().filename().string() + " ";
    EXPECT_EQ(found, "weights ") << "operation " << left << " of rank " << failing;
    EXPECT_EQ(fs::exists(path + "/model.safetensors.index.json"), expert > 1);
  }
}

TEST(Weights, LeaveNothingHalfWrittenBehind) {
  expect_nothing_left_behind(1, 1, 0);
  expect_nothing_left_behind(2, 2, 0);
  expect_nothing_left_behind(2, 2, 1);
}

TEST(Weights, AreWhereAnotherTrainingGoesOn) {
  TemporaryFolder folder;
  const TrainingCase c{.experts = 5, .width = 16, .batch = 8, .steps = 3};
  const TrainerOptions options = trainer_options(c);
  PosixFileSystem files;
  double expected = 0;
  in_world(RankLayout(2, 2, 5), [&](ProcessGroups& groups) {
    Trainer trainer(groups, options);
    for (int64_t k = 0; k < 3; ++k) trainer.step(k);
    trainer.wait_weights();
    Session& session = trainer.session();
    save_weights(files, folder / "weights", session.store, groups, session.compute, {}, 3);
    const double loss = trainer.step(3).loss;
    if (groups.rank == 0) expected = loss;
  });
  for (auto [ranks, expert] : {std::pair{2, 2}, {1, 1}, {3, 1}, {4, 2}})
    in_world(RankLayout(ranks, expert, 5), [&](ProcessGroups& groups) {
      Trainer trainer(groups, options);
      load_weights(folder.path(), trainer.session().store, groups);
      const double loss = trainer.step(3).loss;
      if (groups.layout.expert_size() == 2 && groups.layout.ranks() == 2)
        EXPECT_EQ(loss, expected);
      else
        EXPECT_NEAR(loss, expected, kLossBound * expected);
    });
}

}  // namespace
}  // namespace moemamba
