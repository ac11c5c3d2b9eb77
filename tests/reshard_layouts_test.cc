// A checkpoint of any layout is read by any other: the same values, moments and position.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "core/random.h"
#include "runtime/checkpoint_writer.h"
#include "runtime/reshard.h"
#include "runtime/safetensors.h"
#include "runtime/state_hash.h"
#include "tests/support/in_world.h"
#include "tests/support/small_run.h"
#include "tests/support/soak.h"
#include "tests/support/systems.h"
#include "tests/support/temporary_folder.h"
#include "tests/support/training.h"
#include "tests/support/wrapped_files.h"

namespace moemamba {
namespace {

namespace fs = std::filesystem;

// What stands in element i of a tensor of the state with this seed: its very own bits.
float content(uint64_t seed, StateKind kind, const std::string& tensor, int64_t i) {
  uint64_t hash = seed * 0x9e3779b97f4a7c15u + uint64_t(kind) + 1;
  for (char c : tensor) hash = (hash ^ uint8_t(c)) * 0x100000001b3u;
  hash = (hash + uint64_t(i)) * 0xd6e8feb86659fd93u;
  return float(int32_t(hash >> 40)) / 1024 - 3;
}

// A model that is there to have a state.
struct Holder {
  ParameterStore store;
  LanguageModel model;
  Stream stream = Stream::immediate();

  Holder(ProcessGroups& groups, const ModelSizes& sizes)
      : store(groups), model(sizes, store, groups.layout, groups.rank) {
    store.allocate(ParameterStore::Memory::training);
  }
  std::vector<StatePiece> all() const {
    std::vector<StatePiece> pieces = held_values(store);
    const std::vector<StatePiece> moments = owned_moments(store);
    pieces.insert(pieces.end(), moments.begin(), moments.end());
    return pieces;
  }
  void fill(uint64_t seed) {
    for (const StatePiece& piece : all())
      for (int64_t i = piece.begin; i < piece.end; ++i)
        piece.data[i - piece.begin] = content(seed, piece.kind, piece.tensor, i);
  }
  int64_t wrong(uint64_t seed) const {
    int64_t count = 0;
    for (const StatePiece& piece : all())
      for (int64_t i = piece.begin; i < piece.end; ++i) {
        const float wanted = content(seed, piece.kind, piece.tensor, i);
        count += std::memcmp(&piece.data[i - piece.begin], &wanted, sizeof wanted) != 0;
      }
    return count;
  }
};

struct Place {
  int ranks, expert;
};

CheckpointFacts facts_of(int64_t step) {
  return {.step = step,
          .next_sample = step * 1000 + 7,
          .loss = 1.25,
          .chain = std::string(64, 'a'),
          .run_id = "17",
          .config = "x",
          .tokenizer = "bytes",
          .build = "y",
          .metadata = {},
          .extra_files = {}};
}

void save(FileSystem& files, ProcessGroups& groups, const Holder& holder, const std::string& run,
          int64_t step) {
  CheckpointWriter writer(files, groups, holder.store, {.run = run, .generation = 1});
  writer.stage();
  EXPECT_EQ(writer.write(facts_of(step)), "");
}

uint64_t save_filled(const std::string& run, const ModelSizes& sizes, Place at) {
  uint64_t hash = 0;
  WrappedFiles files;
  in_world(RankLayout(at.ranks, at.expert, int(sizes.E)), [&](ProcessGroups& groups) {
    Holder holder(groups, sizes);
    holder.fill(5);
    const uint64_t own = state_hash(groups, holder.stream, holder.store);
    if (groups.rank == 0) hash = own;
    save(files, groups, holder, run, 1);
  });
  return hash;
}

// Loads what `run` holds at another layout, and saves it from there into `next` where that is one.
void load_at(const std::string& run, const ModelSizes& sizes, Place at, uint64_t hash,
             const std::string& next = "") {
  WrappedFiles files;
  in_world(RankLayout(at.ranks, at.expert, int(sizes.E)), [&](ProcessGroups& groups) {
    Holder holder(groups, sizes);
    const auto found = load_newest(files, groups, holder.stream, holder.store,
                                   {.run = run, .generation = 1, .say = {}});
    ASSERT_TRUE(found);
    EXPECT_EQ(holder.wrong(5), 0) << run << " at " << at.ranks << " ranks, " << at.expert;
    EXPECT_EQ(state_hash(groups, holder.stream, holder.store), hash) << run;
    EXPECT_EQ(found->state_hash(), hash) << run;
    EXPECT_EQ(found->next_sample(), 1007);
    EXPECT_EQ(found->chain(), std::string(64, 'a'));
    if (next != "") save(files, groups, holder, next, 1);
  });
}

// That the pieces cover every tensor once is found anew here, and that the shards hold under their
// own names what the manifest says: what a user of the safetensors package sees.
int64_t expect_exact_cover(const std::string& path, uint64_t seed) {
  const Checkpoint checkpoint(path);
  checkpoint.verify_files();
  const Manifest& m = checkpoint.manifest();
  std::map<std::string, SafetensorsReader> shards;
  for (const auto& file : m.files())
    if (file.name().ends_with(".safetensors"))
      shards.emplace(file.name(), join_path(path, file.name()));
  int64_t pieces = 0;
  std::set<std::pair<std::string, std::string>> used;
  for (const auto& tensor : m.tensors()) {
    const int64_t elements = tensor.shape().elements();
    const auto cover = [&](const auto& list, StateKind kind) {
      std::vector<char> seen(static_cast<size_t>(elements));
      for (const auto& piece : list) {
        ++pieces;
        const std::string file = m.files(piece.file()).name();
        const bool whole = kind == StateKind::value;
        const std::string name = whole ? tensor.name()
                                       : concat(kStateNames[int(kind)], "/", tensor.name(), "[",
                                                piece.begin(), ":", piece.end(), "]");
        const SafetensorsReader& shard = shards.at(file);
        const StoredTensor* stored = shard.find(name);
        ASSERT_TRUE(stored) << file << ": no " << name;
        EXPECT_TRUE(used.emplace(file, name).second) << name;
        EXPECT_EQ(stored->dtype, DType::f32);
        EXPECT_EQ(stored->shape.elements(), piece.end() - piece.begin());
        const auto* values = reinterpret_cast<const float*>(shard.data(*stored));
        for (int64_t i = piece.begin(); i < piece.end(); ++i) {
          EXPECT_EQ(seen[size_t(i)]++, 0) << name;
          EXPECT_EQ(values[i - piece.begin()], content(seed, kind, tensor.name(), i)) << name;
        }
      }
      EXPECT_EQ(std::count(seen.begin(), seen.end(), 1), elements) << tensor.name();
    };
    cover(tensor.value(), StateKind::value);
    if (tensor.exp_avg().empty()) continue;  // a state
    cover(tensor.exp_avg(), StateKind::exp_avg);
    cover(tensor.exp_avg_sq(), StateKind::exp_avg_sq);
  }
  size_t stored = 0;
  for (const auto& [name, shard] : shards) stored += shard.tensors().size();
  EXPECT_EQ(stored, used.size()) << "shards hold more than the manifest knows";
  const auto index =
      nlohmann::json::parse(read_file(join_path(path, "model.safetensors.index.json")));
  EXPECT_EQ(index["weight_map"].size(), size_t(m.tensors_size()));
  for (const auto& [name, file] : index["weight_map"].items())
    EXPECT_TRUE(shards.at(file.get<std::string>()).find(name)) << name;
  return pieces;
}

std::vector<Place> places(int64_t experts) {
  std::vector<Place> all;
  for (int ranks : {1, 2, 3, 4, 8})
    for (int expert = 1; expert <= ranks && expert <= experts; ++expert)
      if (ranks % expert == 0) all.push_back({ranks, expert});
  return all;
}

TEST(Reshard, EveryPairOfLayoutsGivesEveryBitBack) {
  TemporaryFolder folder;
  int64_t pairs = 0, pieces = 0;
  for (int64_t experts : {42, 5}) {
    const ModelSizes sizes = trainer_options({.experts = experts,
                                              .blocks = 1,
                                              .width = 10,
                                              .hidden = 7,
                                              .activation = ModelConfig::SWIGLU,
                                              .model = "router: SIGMOID router_bias_rate: 0.01"})
                                 .sizes;
    uint64_t hash = 0;
    for (const Place& from : places(experts)) {
      const std::string run = folder / "run";
      const uint64_t own = save_filled(run, sizes, from);
      hash = hash ? hash : own;
      EXPECT_EQ(own, hash) << "the state's hash depends on the layout";
      const std::string path = list_checkpoints(run).front().path;
      EXPECT_EQ(hash_of_files(path), hash);
      pieces += expect_exact_cover(path, 5);
      for (const Place& to : places(experts)) {
        load_at(run, sizes, to, hash);
        ++pairs;
      }
      fs::remove_all(run);
    }
  }
  report_cases("P14 pairs of layouts", pairs);
  report_cases("P15 pieces found once and right", pieces);
}

std::map<std::string, std::string> bytes_of(const std::string& run) {
  std::map<std::string, std::string> files;
  for (const auto& entry : fs::directory_iterator(list_checkpoints(run).front().path))
    files[entry.path().filename().string()] = read_file(entry.path().string());
  return files;
}

// Through three layouts and back: every byte of every file is what it was.
TEST(Reshard, EverySystemComesBackByteForByte) {
  TemporaryFolder folder;
  int cases = 0;
  for (const System& system : kSystems) {
    const ModelSizes sizes = trainer_options({.model = system.model}).sizes;
    const Place way[] = {{2, 2}, {4, 2}, {3, 1}, {8, 4}, {1, 1}, {2, 2}};
    const uint64_t hash = save_filled(folder / "0", sizes, way[0]);
    for (size_t i = 1; i < std::size(way); ++i, ++cases)
      load_at(folder / std::to_string(i - 1), sizes, way[i], hash, folder / std::to_string(i));
    EXPECT_TRUE(bytes_of(folder / "0") == bytes_of(folder / "5")) << system.name;
    for (size_t i = 0; i < std::size(way); ++i) fs::remove_all(folder / std::to_string(i));
  }
  report_cases("P13, P14 reshards of systems", cases);
}

// The copy is taken when training is told to go on: whatever it does then, the files do not see.
TEST(Reshard, ACopyIsSavedNotWhatTrainingMakesOfItMeanwhile) {
  TemporaryFolder folder;
  int64_t changed = 0;
  for (const Place& at : places(5)) {
    const ModelSizes sizes =
        trainer_options({.model = "router: SIGMOID router_bias_rate: 0.01"}).sizes;
    save_filled(folder / "still", sizes, at);
    WrappedFiles files;
    in_world(RankLayout(at.ranks, at.expert, int(sizes.E)), [&](ProcessGroups& groups) {
      Holder holder(groups, sizes);
      holder.fill(5);
      CheckpointWriter writer(files, groups, holder.store,
                              {.run = folder / "moved", .generation = 1});
      writer.stage();
      holder.fill(6);  // every element
      if (groups.rank == 0) changed += holder.wrong(5);
      EXPECT_EQ(writer.write(facts_of(1)), "");
    });
    EXPECT_TRUE(bytes_of(folder / "still") == bytes_of(folder / "moved")) << at.ranks;
    fs::remove_all(folder / "still");
    fs::remove_all(folder / "moved");
  }
  EXPECT_GT(changed, 10000);
  report_cases("P19 elements changed under a save", changed);
}

// Whole runs: a save that takes as long as four steps writes what one that all wait for writes.
TEST(Reshard, AsynchronousSavesAreSynchronousOnesByteForByte) {
  TemporaryFolder folder;
  for (auto [ranks, expert] : {std::pair{1, 1}, {2, 2}}) {
    std::map<std::string, std::string> bytes[2];
    for (const bool asynchronous : {false, true}) {
      SmallRun run{.folder = folder / "run",
                   .ranks = ranks,
                   .expert = expert,
                   .steps = 10,
                   .save_interval = 3,
                   .asynchronous = asynchronous,
                   .keep_last = 9};
      std::atomic<int64_t> steps{0};
      std::atomic<bool> behind{false};
      WrappedFiles slow;
      if (asynchronous) {
        run.before_step = [&](int rank, int64_t step) {
          if (rank == 0) steps = step;
        };
        // Step 3 is done; nothing of it is written before step 6 begins, which then waits for it.
        slow.before_write = [&](const std::string& path) {
          const bool shard = path.find("step-00000003.tmp") != std::string::npos &&
                             path.find("-00001-of") != std::string::npos;
          if (!shard) return;
          for (int i = 0; i < 3000 && steps < 5; ++i)
            std::this_thread::sleep_for(std::chrono::milliseconds(10));
          if (steps >= 5) behind = true;
        };
      }
      run.files = &slow;
      launch(run);
      EXPECT_EQ(behind, asynchronous) << "the save was not behind the steps";
      for (const CheckpointPlace& place : list_checkpoints(run.folder))
        for (const auto& entry : fs::directory_iterator(place.path)) {
          std::string content = read_file(entry.path().string());
          if (entry.path().filename() == kManifestName) {
            CheckpointManifest manifest = whole_manifest(content);
            manifest.clear_run_id();  // of another run
            content = seal(manifest);
          }
          bytes[asynchronous][concat(place.step, "/", entry.path().filename().string())] = content;
        }
      EXPECT_EQ(list_checkpoints(run.folder).size(), 4u);
      fs::remove_all(run.folder);
    }
    EXPECT_EQ(bytes[0].size(), bytes[1].size());
    EXPECT_TRUE(bytes[0] == bytes[1]) << ranks << " ranks";
  }
}

std::vector<double> losses_of(const std::string& run) {
  std::vector<double> losses;
  for (const std::string& line : steps_of(run))
    losses.push_back(nlohmann::json::parse(line).at("loss").get<double>());
  return losses;
}

// Ten steps here, ten there: the losses are the uninterrupted run's within the bound of layouts.
TEST(Reshard, TrainingGoesOnWithinTheBoundOfLayouts) {
  TemporaryFolder folder;
  const SmallRun one{.folder = folder / "whole", .experts = 5, .steps = 20, .batch = 6};
  launch(one);
  const std::vector<double> whole = losses_of(one.folder);
  double worst = 0;
  int pairs = 0;
  for (auto [from, to] : {std::pair{Place{1, 1}, Place{4, 2}},
                          {Place{2, 2}, Place{3, 3}},
                          {Place{4, 4}, Place{1, 1}},
                          {Place{3, 1}, Place{2, 2}},
                          {Place{8, 4}, Place{2, 1}}}) {
    SmallRun run = one;
    run.folder = folder / "run";
    run.ranks = from.ranks, run.expert = from.expert, run.launch_steps = 10;
    EXPECT_TRUE(launch(run).stopped);
    const CheckpointManifest half = newest_manifest(run.folder);
    EXPECT_EQ(half.next_sample(), 60);
    run.ranks = to.ranks, run.expert = to.expert, run.launch_steps = 0;
    launch(run);
    const std::vector<double> losses = losses_of(run.folder);
    ASSERT_EQ(losses.size(), whole.size());
    for (size_t i = 0; i < whole.size(); ++i) {
      worst = std::max(worst, std::abs(losses[i] / whole[i] - 1));
      EXPECT_LE(std::abs(losses[i] / whole[i] - 1), kLossBound) << "step " << i;
    }
    EXPECT_EQ(newest_manifest(run.folder).next_sample(), 120);
    fs::remove_all(run.folder);
    ++pairs;
  }
  std::printf("pairs: %d, worst relative difference of a loss %.2g, bound %.2g\n", pairs, worst,
              kLossBound);
}

// Another model's checkpoint is refused by names and shapes, and nothing is touched.
TEST(Reshard, AnotherModelIsRefusedAndNothingIsTouched) {
  TemporaryFolder folder;
  SmallRun run{.folder = folder / "run", .ranks = 2, .expert = 2, .launch_steps = 3};
  launch(run);
  const auto before = tree_of(run.folder);
  run.model = "blocks: 2";
  const std::string why = message_of([&] { find_newest(run); });
  EXPECT_NE(why.find("this checkpoint belongs to another model:"), std::string::npos) << why;
  EXPECT_NE(why.find("blocks.1."), std::string::npos) << why;
  run.model = "";
  run.experts = 4;
  EXPECT_NE(message_of([&] { find_newest(run); }).find("experts.3."), std::string::npos);
  EXPECT_TRUE(tree_of(run.folder) == before);
}

// Whoever puts it there when every byte has been verified.
TEST(Reshard, FollowsNoSymlinkThatComesIntoAFilesPlace) {
  TemporaryFolder folder;
  const ModelSizes sizes = trainer_options({.experts = 3}).sizes;
  WrappedFiles files;
  in_world(RankLayout(1, 1, 3), [&](ProcessGroups& groups) {
    Holder holder(groups, sizes);
    holder.fill(5);
    CheckpointWriter writer(files, groups, holder.store, {.run = folder / "run", .generation = 1});
    writer.stage();
    CheckpointFacts facts = facts_of(1);
    facts.extra_files = {{"tokenizer.model", "words"}};
    EXPECT_EQ(writer.write(facts), "");
  });
  const Checkpoint from(list_checkpoints(folder / "run").front().path);
  const std::string tokenizer = from.path() + "/tokenizer.model";
  files.before_write = [&](const std::string&) {
    if (file_exists(folder / "other")) return;
    fs::remove(tokenizer);
    fs::create_symlink(folder.put("other", "other words"), tokenizer);
  };
  const std::string why = message_of([&] {
    reshard(
        files, from,
        {.output = folder / "made", .layout = RankLayout(2, 1, 3), .sizes = sizes, .config = "x"});
  });
  EXPECT_NE(why.find(tokenizer + ": cannot open"), std::string::npos) << why;
  EXPECT_FALSE(file_exists(folder / "made"));
}

}  // namespace
}  // namespace moemamba
