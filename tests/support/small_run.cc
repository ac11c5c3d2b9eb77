#include "tests/support/small_run.h"

#include <google/protobuf/text_format.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "runtime/model_kind.h"
#include "runtime/state_hash.h"
#include "tests/support/in_world.h"
#include "tests/support/training.h"
#include "tests/support/wrapped_files.h"

namespace moemamba {

namespace {

namespace fs = std::filesystem;

// The first tokens of the synthetic text alone.
std::string short_tokens(int64_t tokens) {
  const std::string whole = synthetic_tokens(61),
                    path = whole + "." + std::to_string(tokens) + ".bin";
  if (!fs::exists(path)) {
    fs::copy_file(whole, path);
    fs::resize_file(path, uintmax_t(tokens) * 2);
  }
  return path;
}

template <class Message>
void merge(const char* text, Message* message) {
  check(google::protobuf::TextFormat::MergeFromString(text, message), "not settings: ", text);
}

StatePiece whole_piece(const Manifest::Tensor& tensor, StateKind kind, std::vector<float>& values) {
  StatePiece piece{.tensor = tensor.name(), .shape = tensor.shape(), .kind = kind};
  piece.end = piece.shape.elements();
  values.resize(size_t(piece.end));
  piece.data = values.data();
  return piece;
}

template <class Work>
void for_each_tensor(const std::string& path, Work&& work) {
  const Checkpoint checkpoint(path);
  for (const auto& tensor : checkpoint.manifest().tensors())
    for (StateKind kind : {StateKind::value, StateKind::exp_avg, StateKind::exp_avg_sq}) {
      if (kind != StateKind::value && tensor.exp_avg().empty()) continue;
      std::vector<float> values;
      const StatePiece piece = whole_piece(tensor, kind, values);
      checkpoint.read(piece);
      work(piece, std::move(values));
    }
}

}  // namespace

TrainRequest request_of(const SmallRun& run) {
  TrainRequest request{.run = run.folder};
  request.model.set_width(8);
  request.model.set_blocks(1);
  request.model.set_experts(int(run.experts));
  request.model.set_expert_hidden(6);
  request.model.set_state(4);
  request.model.set_vocabulary(int(run.vocabulary));
  merge(run.model, &request.model);
  request.train.set_steps(run.steps);
  request.train.set_sequence_length(16);
  request.train.set_global_batch_size(int(run.batch));
  request.train.set_micro_batch_size(int(run.micro_batch));
  request.train.set_save_interval(run.save_interval);
  request.train.set_lr(1e-2f);
  request.train.set_seed(run.seed);
  request.train.set_progress(TrainConfig::OFF);
  merge(run.train, &request.train);
  request.checkpoint.set_asynchronous(run.asynchronous);
  request.checkpoint.set_keep_last(run.keep_last);
  request.checkpoint.set_hash_interval(1);
  if (run.vocabulary > 0) request.data.set_tokenizer("none");
  merge(run.data, &request.data);
  if (request.data.train_size() == 0)
    request.data.add_train(run.tokens > 0 ? short_tokens(run.tokens) : synthetic_tokens(61));
  request.on_event = run.on_event;
  request.resolved_text = "a small run\n";
  request.build = "a test\n";
  return request;
}

TrainResult launch(const SmallRun& run) {
  const TrainRequest request = request_of(run);
  std::vector<TrainResult> results(static_cast<size_t>(run.ranks));
  const bool mixture = request.model.experts() > 0 && run.expert <= run.experts;
  check(mixture, "experts over too many ranks");
  in_world(RankLayout(run.ranks, run.expert, int(run.experts)), [&](ProcessGroups& groups) {
    TrainRequest own = request;
    own.stop_wanted = [&run, rank = groups.rank, step = int64_t{0}]() mutable {
      if (run.before_step) run.before_step(rank, step);
      check(step != run.crash_at || rank != run.ranks - 1, "crashed, as the test wants");
      const bool stops = ++step == run.launch_steps || (run.stop_when && run.stop_when());
      return stops && rank == run.stop_rank;
    };
    if (run.spoil)
      own.spoil = [&run, rank = groups.rank](int64_t step) { return run.spoil(rank, step); };
    if (run.change) run.change(groups.rank, own);
    if (run.wire) run.wire(groups);
    WrappedFiles files;
    results[size_t(groups.rank)] = run_training(run.files ? *run.files : files, groups, own);
  });
  for (const TrainResult& result : results)
    check(result.stopped == results[0].stopped, "ranks disagree about the end");
  return results[0];
}

std::vector<std::string> steps_of(const std::string& run) {
  std::vector<std::string> steps;
  std::ifstream file(join_path(run, "metrics.jsonl"));
  for (std::string line; std::getline(file, line);) {
    auto row = nlohmann::json::parse(line);
    row.erase("seconds");
    row.erase("tokens_per_second");
    steps.push_back(row.dump());
  }
  return steps;
}

CheckpointManifest newest_manifest(const std::string& run) {
  const auto places = list_checkpoints(run);
  check(!places.empty(), run, ": no checkpoint");
  const Checkpoint checkpoint(places.front().path);
  checkpoint.verify_files();
  return checkpoint.manifest().facts();
}

CheckpointManifest whole_manifest(const std::string& sealed) {
  unseal(sealed, "manifest");
  SealedManifest outer;
  CheckpointManifest inner;
  check(outer.ParseFromString(sealed) && inner.ParseFromString(outer.manifest()), "no manifest");
  return inner;
}

std::map<std::string, std::vector<float>> whole_state(const std::string& checkpoint) {
  std::map<std::string, std::vector<float>> state;
  for_each_tensor(checkpoint, [&](const StatePiece& piece, std::vector<float> values) {
    state[concat(kStateNames[int(piece.kind)], "/", piece.tensor)] = std::move(values);
  });
  return state;
}

uint64_t hash_of_files(const std::string& checkpoint) {
  uint64_t hash = 0;
  for_each_tensor(checkpoint, [&](const StatePiece& piece, const std::vector<float>&) {
    hash += state_hash_of({piece});
  });
  return hash;
}

std::map<std::string, std::string> tree_of(const std::string& folder) {
  std::map<std::string, std::string> tree;
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    const std::string name = entry.path().lexically_relative(folder).string();
    if (entry.is_symlink())
      tree[name] = "link to " + fs::read_symlink(entry.path()).string();
    else if (entry.is_directory())
      tree[name] = "folder";
    else if (!entry.is_regular_file())
      tree[name] = "something else";
    else
      tree[name] = concat("file of ", entry.last_write_time().time_since_epoch().count(), "\n",
                          read_file(entry.path().string()));
  }
  return tree;
}

void copy_tree(const std::string& from, const std::string& to) {
  fs::create_directories(to);
  fs::copy(from, to, fs::copy_options::recursive | fs::copy_options::copy_symlinks);
}

std::optional<CheckpointManifest> find_newest(const SmallRun& run, std::string* said,
                                              int64_t generation) {
  const TrainRequest request = request_of(run);
  const ModelSizes sizes = model_sizes(request.model, run.vocabulary ? run.vocabulary : 257,
                                       request.train.sequence_length());
  std::optional<CheckpointManifest> found;
  in_world(RankLayout(run.ranks, run.expert, int(run.experts)), [&](ProcessGroups& groups) {
    Session session(groups, sizes, 1, run.batch, request.train.sequence_length(), 1.25,
                    Session::Memory::training);
    WrappedFiles files;
    const auto own = load_newest(
        files, groups, session.compute, session.store,
        {.run = run.folder, .generation = generation, .say = [&](const std::string& text) {
           if (said) *said += text + "\n";
         }});
    if (own)
      check(state_hash(groups, session.compute, session.store) == own->state_hash(),
            "what was loaded has another hash");
    if (groups.rank == 0) found = own;
  });
  return found;
}

}  // namespace moemamba
