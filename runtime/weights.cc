#include "runtime/weights.h"

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>

#include "core/host_mirror.h"
#include "parallel/gather_blobs.h"
#include "runtime/checkpoint_parts.h"
#include "runtime/checkpoint_reader.h"
#include "runtime/safetensors.h"
#include "runtime/weights_files.h"

namespace moemamba {

namespace {

namespace fs = std::filesystem;

// Where a folder of weights is made, and where the one before waits until it is replaced.
std::string fresh_name(const std::string& folder) {
  return folder + ".tmp";
}

std::string shard_name(int shard, int shards) {
  if (shards == 1) return "model.safetensors";
  char name[64];
  std::snprintf(name, sizeof name, "model-%05d-of-%05d.safetensors", shard + 1, shards);
  return name;
}

// What this rank writes: its experts, and the dense tensors on the first.
std::vector<NamedTensor> own_tensors(const ParameterStore& store, bool first) {
  std::vector<NamedTensor> own;
  for (const NamedTensor& tensor : store.named_tensors())
    if (first || tensor.name.find(".experts.") != std::string::npos) own.push_back(tensor);
  return own;
}

void write_shard(FileSystem& files, const std::string& path, const std::vector<NamedTensor>& own,
                 const WeightsMetadata& metadata, DeviceKind device) {
  std::vector<StoredTensor> stored;
  for (const NamedTensor& t : own)
    stored.push_back({.name = t.name, .dtype = DType::f32, .shape = t.value.shape});
  SafetensorsWriter writer(files, path, stored, metadata);
  HostMirror mirror(device);
  for (const NamedTensor& t : own) writer.write(mirror.read(t.value));
  writer.commit();
}

void write_index(FileSystem& files, const std::string& folder, int shards) {
  nlohmann::ordered_json map;
  int64_t bytes = 0;
  for (int i = 0; i < shards; ++i) {
    const SafetensorsReader reader(join_path(folder, shard_name(i, shards)));
    for (const StoredTensor& tensor : reader.tensors()) {
      map[tensor.name] = shard_name(i, shards);
      bytes += tensor.end - tensor.begin;
    }
  }
  nlohmann::ordered_json index;
  index["metadata"]["total_size"] = bytes;
  index["weight_map"] = map;
  write_file(files, join_path(folder, kIndexName), index.dump(1) + "\n");
}

int64_t step_in(const WeightsMetadata& metadata) {
  const auto stored = metadata.find("step");
  int64_t step = -1;
  if (stored != metadata.end())
    std::from_chars(stored->second.data(), stored->second.data() + stored->second.size(), step);
  return step;
}

using Found = std::map<std::string, std::pair<const SafetensorsReader*, const StoredTensor*>>;

// Every difference between what the model needs (dense tensors and all experts) and the files.
std::string differences(const ParameterStore& store, const RankLayout& layout, const Found& found) {
  std::string text;
  std::map<std::string, bool> wanted;
  const auto want = [&](const std::string& name, const Shape& shape) {
    wanted[name] = true;
    const auto at = found.find(name);
    if (at == found.end())
      text += concat("\n  ", name, ": missing; the model wants ", to_string(shape));
    else if (!(at->second.second->shape == shape))
      text += concat("\n  ", name, ": ", to_string(at->second.second->shape), ", the model wants ",
                     to_string(shape));
  };
  for (const Parameter& p : store.parameters()) {
    const size_t at = p.name.find("{}");
    if (at == std::string::npos) {
      want(p.name, p.shape);
      continue;
    }
    for (int e = 0; e < layout.experts(); ++e)
      want(p.name.substr(0, at) + std::to_string(e) + p.name.substr(at + 2),
           {p.shape[1], p.shape[2]});
  }
  for (const Parameter& state : store.states()) want(state.name, state.shape);
  for (const auto& [name, unused] : found)
    if (!wanted.count(name)) text += concat("\n  ", name, ": the model has no such tensor");
  return text;
}

void replace_folder(FileSystem& files, const std::string& folder) {
  const std::string fresh = fresh_name(folder), old = old_weights(folder);
  files.sync_folder(fresh);
  if (fs::exists(folder)) {  // else `old` may be all there is
    remove_tree(files, old);
    files.rename(folder, old);
  }
  files.rename(fresh, folder);
  files.sync_folder(folder_of(folder));
  remove_tree(files, old);
}

// After a failure: what is half-written goes, the weights before come back. As far as the disk
// lets it; load_weights and the next save put up with the rest.
void clean_up(FileSystem& files, const std::string& folder) noexcept {
  try {
    remove_tree(files, fresh_name(folder));
    if (fs::exists(folder))
      remove_tree(files, old_weights(folder));
    else if (fs::exists(old_weights(folder)))
      files.rename(old_weights(folder), folder);
  } catch (const std::exception&) {  // the first error is the one to report
  }
}

// Every rank calls it, whatever `work` did on it: ends when all have come, so that nobody still
// writes when rank 0 cleans up. Throws what `work` threw, or that another rank's did.
void together(ProcessGroups& groups, Stream& stream, FunctionRef<void()> work,
              FunctionRef<void()> clean_up) {
  std::exception_ptr error;
  try {
    work();
  } catch (const std::exception&) {
    error = std::current_exception();
  }
  const uint8_t failed = error != nullptr;
  std::vector<uint8_t> of_ranks(size_t(groups.layout.ranks()));
  groups.control->all_gather(stream, &failed, of_ranks.data(), 1);
  stream.synchronize();
  const auto first = std::ranges::find(of_ranks, uint8_t(1));
  if (first == of_ranks.end()) return;
  if (groups.rank == 0) clean_up();
  try {
    barrier(*groups.control, stream);  // ranks that throw end the others
  } catch (const PeerLost&) {
    if (!error) throw;  // else what failed here says more than that the others have ended
  }
  if (error) std::rethrow_exception(error);
  throw PeerLost(groups.control->name(), int(first - of_ranks.begin()),
                 "stopped: it could not write its part of the weights");
}

}  // namespace

void save_weights(FileSystem& files, const std::string& folder, const ParameterStore& store,
                  ProcessGroups& groups, Stream& stream, WeightsMetadata metadata, int64_t step) {
  metadata["step"] = std::to_string(step);
  metadata["format"] = "pt";
  const int shards = groups.layout.expert_size();
  const int shard = groups.layout.expert_coordinate(groups.rank);
  const bool writes = groups.layout.expert_data_coordinate(groups.rank) == 0;
  const std::string fresh = fresh_name(folder);
  const auto clean = [&] { clean_up(files, folder); };
  const auto make_folder = [&] {
    if (groups.rank != 0) return;
    remove_tree(files, fresh);
    files.make_folders(fresh);
  };
  const auto write_own = [&] {
    if (writes)
      write_shard(files, join_path(fresh, shard_name(shard, shards)),
                  own_tensors(store, shard == 0), metadata, groups.device);
  };
  const auto finish = [&] {
    if (groups.rank != 0) return;
    if (shards > 1) write_index(files, fresh, shards);
    replace_folder(files, folder);
  };
  together(groups, stream, make_folder, clean);
  together(groups, stream, write_own, clean);
  together(groups, stream, finish, clean);
}

namespace {

// What is wrong with the checkpoint at `path`, or "". Throws what says nothing about that.
using Judge = FunctionRef<std::string(const std::string& path)>;

std::string problem_at_sizes(const std::string& path) {
  try {
    const Checkpoint checkpoint(path);
    return "";
  } catch (const OtherFormat&) {
    throw;
  } catch (const Unavailable&) {
    throw;
  } catch (const Error& error) {
    return *error.what() ? error.what() : "unknown";
  }
}

// All ranks look at the same checkpoint, each at every byte of its share of the files. Rank 0 hears
// what they say; the others get "".
std::string problem_at_every_byte(const std::string& path, ProcessGroups& groups, Stream& stream) {
  std::string own;  // "", or what is wrong behind a sign: whether the checkpoint is to blame
  const auto told = [&](const char* sign, const std::exception& error) {
    return concat(sign, "rank ", groups.rank, ": ", error.what());
  };
  try {
    Checkpoint(path).verify_files(groups.rank, groups.layout.ranks(), groups.ranks_of_machine);
  } catch (const OtherFormat& error) {
    own = told("?", error);
  } catch (const Unavailable& error) {
    own = told("?", error);
  } catch (const Error& error) {
    own = told("-", error);
  } catch (const std::exception& error) {  // no memory, no thread
    own = told("?", error);
  }
  std::string damage, trouble;
  for (const std::string& of_rank : gather_blobs(*groups.control, stream, own)) {
    std::string& first = of_rank.rfind('-', 0) == 0 ? damage : trouble;
    if (first.empty() && !of_rank.empty()) first = of_rank.substr(1);
  }
  check(!damage.empty() || trouble.empty(), trouble);
  return damage;
}

// `itself`: `path` is judged too, where it is a checkpoint.
FoundWeights newest_weights(const std::string& path, bool itself, Judge judge) {
  const std::string inner = whole_weights(join_path(path, "weights"));
  const bool exported = fs::is_directory(inner);
  FoundWeights found{.path = exported ? inner : path};
  std::string problem;
  if (itself && file_exists(join_path(path, kManifestName))) problem = judge(path);
  check(problem.empty(), problem);
  if (exported) found.step = step_in(open_weights(inner).front().metadata());
  if (exported && found.step < 0) return found;  // not ours: whoever put them there wants them
  for (const CheckpointPlace& place : list_checkpoints(path)) {
    if (place.step <= found.step) break;
    const std::string of_place = judge(place.path);
    if (of_place.empty()) return {.path = place.path, .step = place.step};
    if (problem.empty()) problem = of_place;
  }
  check(exported || problem.empty(), path, ": none of its checkpoints can be used: ", problem);
  return found;
}

}  // namespace

FoundWeights find_weights(const std::string& path) {
  return newest_weights(path, false,
                        [](const std::string& place) { return problem_at_sizes(place); });
}

std::string describe(const FoundWeights& found) {
  return found.step < 0 ? found.path : concat(found.path, ", of step ", found.step);
}

FoundWeights find_weights(const std::string& path, ProcessGroups& groups, Stream& stream) {
  // Rank 0 says: "?PATH", look at this checkpoint; and at last "+STEP PATH", or "!" and why not.
  const auto tell = [&](const std::string& word) {
    return broadcast_blob(*groups.control, stream, word);
  };
  std::string answer;
  if (groups.rank == 0) {
    try {
      const FoundWeights found = newest_weights(path, true, [&](const std::string& place) {
        const std::string problem = problem_at_sizes(place);
        if (!problem.empty()) return problem;
        tell("?" + place);
        return problem_at_every_byte(place, groups, stream);
      });
      answer = concat("+", found.step, " ", found.path);
    } catch (const PeerLost&) {
      throw;
    } catch (const std::exception& error) {
      answer = concat("!", error.what());
    }
    tell(answer);
  } else {
    while ((answer = tell("")).rfind('?', 0) == 0)
      problem_at_every_byte(answer.substr(1), groups, stream);
  }
  check(answer.rfind('+', 0) == 0, answer.substr(1));
  const size_t space = answer.find(' ');
  return {.path = answer.substr(space + 1), .step = std::stoll(answer.substr(1, space - 1))};
}

WeightsMetadata read_weights_metadata(const std::string& path) {
  return open_weights(find_weights(path).path).front().metadata();
}

void load_weights(const std::string& path, const ParameterStore& store,
                  const ProcessGroups& groups) {
  const std::vector<SafetensorsReader> readers = open_weights(find_weights(path).path);
  Found found;
  for (const SafetensorsReader& reader : readers)
    for (const StoredTensor& tensor : reader.tensors()) found[tensor.name] = {&reader, &tensor};
  std::string text = differences(store, groups.layout, found);
  constexpr size_t kMost = 4000;
  if (text.size() > kMost) text = text.substr(0, text.rfind('\n', kMost)) + "\n  ... and more";
  check(text.empty(), path, ": these weights belong to another model:", text,
        "\nset model.* to the values in the config.textproto of the run that wrote them");
  HostMirror mirror(groups.device);
  for (const NamedTensor& tensor : store.named_tensors()) {
    const auto& [reader, stored] = found.at(tensor.name);
    Tensor value = mirror.blank(tensor.value);
    value.shape = stored->shape;
    reader->read(*stored, value);
    value.shape = tensor.value.shape;
    mirror.write_back(value, tensor.value);
  }
}

}  // namespace moemamba
