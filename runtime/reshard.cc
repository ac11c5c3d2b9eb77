#include "runtime/reshard.h"

#include <filesystem>

#include "core/error.h"
#include "model/language_model.h"
#include "runtime/checkpoint_parts.h"
#include "runtime/checkpoint_shard.h"
#include "runtime/state_hash.h"

namespace moemamba {

namespace {

// One rank of the layout: everything has its place and nothing has memory.
class PlannedState {
 public:
  PlannedState(const ReshardRequest& request, int rank)
      : groups_(make_planned_groups(request.layout, rank)),
        store_(groups_),
        model_(request.sizes, store_, groups_.layout, rank) {
    store_.allocate(ParameterStore::Memory::planned_training);
  }
  const ParameterStore& store() const { return store_; }

 private:
  ProcessGroups groups_;
  ParameterStore store_;
  LanguageModel model_;
};

// Of the file that holds the first tensor's values.
SafetensorsMetadata metadata_of(const Checkpoint& from, const std::string& config) {
  const Manifest& m = from.manifest();
  check(m.tensors_size() > 0 && !m.tensors(0).value().empty(), from.path(), ": holds no tensors");
  const std::string name = m.files((*m.tensors(0).value().begin()).file()).name();
  SafetensorsMetadata metadata =
      SafetensorsReader(join_path(from.path(), name), Links::refused).metadata();
  metadata["config"] = config;
  return metadata;
}

// A folder beside `output` that becomes `output` by one rename, or goes again.
class NewFolder {
 public:
  NewFolder(FileSystem& files, const std::string& output, int64_t bytes)
      : files_(files), output_(output), path_(concat(output, ".tmp-", fresh_nonce())) {
    check(!std::filesystem::exists(std::filesystem::symlink_status(output)), output,
          ": is there already; choose another --output");
    files.make_folders(folder_of(output));
    const int64_t room = files.free_bytes(folder_of(output)), needed = bytes + bytes / 20;
    check(room >= needed, output, ": the disk has ", room, " bytes left, this takes ", needed);
    files.make_folder(path_);
  }
  ~NewFolder() {
    if (committed_) return;
    try {
      remove_tree(files_, path_);
    } catch (const std::exception&) {  // the first error is the one to report
    }
  }
  const std::string& path() const { return path_; }
  void commit() {
    files_.sync_folder(path_);
    // Where the file system cannot rename onto nothing alone, the check above must do.
    if (!files_.rename_new(path_, output_)) files_.rename(path_, output_);
    committed_ = true;
    files_.sync_folder(folder_of(output_));
  }

 private:
  FileSystem& files_;
  std::string output_, path_;
  bool committed_ = false;
};

int64_t bytes_of(const Checkpoint& checkpoint) {
  int64_t bytes = 0;
  for (const auto& file : checkpoint.manifest().files()) bytes += file.bytes();
  return bytes;
}

// Writes what `rank` of the layout writes.
std::string write_rank(FileSystem& files, const Checkpoint& from, const ReshardRequest& request,
                       const SafetensorsMetadata& metadata, const std::string& folder, int rank) {
  const PlannedState planned(request, rank);
  if (rank == 0) {
    const std::string other = from.differences(planned.store());
    check(other.empty(), from.path(), ": does not fit its own settings:", other);
  }
  ShardReport report;
  uint64_t hash = 0;
  const auto read = [&](const StatePiece& part) {
    from.read(part);
    hash += state_hash_of({part});
  };
  for (const Shard& shard :
       shards_of(written_pieces(planned.store()), rank, request.layout.ranks(), metadata))
    write_shard(files, folder, shard, read, report);
  report.set_state_hash(hash);
  return report.SerializeAsString();
}

// Small files that go along with the shards: the tokenizer.
void copy_others(const Checkpoint& from,
                 FunctionRef<void(const std::string& name, const std::string& content)> write) {
  std::vector<bool> holds_pieces(size_t(from.manifest().files_size()));
  for (const auto& tensor : from.manifest().tensors())
    for (const auto& pieces : {tensor.value(), tensor.exp_avg(), tensor.exp_avg_sq()})
      for (const auto& piece : pieces) holds_pieces[size_t(piece.file())] = true;
  for (size_t i = 0; i < holds_pieces.size(); ++i) {
    const std::string name = from.manifest().files(int(i)).name();
    if (!holds_pieces[i] && name != kIndexName)
      write(name, read_regular_file(join_path(from.path(), name)));
  }
}

void check_name(const Checkpoint& from, const std::string& output) {
  const auto step = step_of_name(std::filesystem::path(output).filename().string());
  const int64_t own = from.manifest().facts().step();
  check(!step || *step == own, output, ": is the name of a checkpoint of step ", step.value_or(0),
        ", this one is of step ", own);
}

// One that was written where a run's would lie makes a run there, with which training goes on.
void make_run(FileSystem& files, const std::string& output, const std::string& config) {
  const std::string all = folder_of(output),
                    settings = join_path(folder_of(all), "config.textproto");
  if (std::filesystem::path(all).filename() != "checkpoints" || file_exists(settings)) return;
  write_file(files, settings, config);
}

}  // namespace

void reshard(FileSystem& files, const Checkpoint& from, const ReshardRequest& request) {
  check_name(from, request.output);
  from.verify_files();
  const SafetensorsMetadata metadata = metadata_of(from, request.config);
  NewFolder folder(files, request.output, bytes_of(from));
  std::vector<std::string> reports;
  for (int rank = 0; rank < request.layout.ranks(); ++rank)
    reports.push_back(write_rank(files, from, request, metadata, folder.path(), rank));
  CheckpointManifest manifest = from.manifest().facts();
  manifest.clear_state_hash();
  manifest.set_format(kManifestFormat);
  manifest.set_ranks(request.layout.ranks());
  manifest.set_expert_ranks(request.layout.expert_size());
  manifest.set_config(request.config);
  merge_reports(reports, manifest);
  check(manifest.state_hash() == from.manifest().facts().state_hash(), from.path(),
        ": what was read has the hash ", state_hash_text(manifest.state_hash()),
        ", what was saved ", state_hash_text(from.manifest().facts().state_hash()));
  ShardReport small;
  std::vector<std::unique_ptr<OutputFile>> written;
  const auto write = [&](const std::string& name, const std::string& content) {
    written.push_back(write_small_file(files, folder.path(), name, content, small));
  };
  write(kIndexName, weights_index(manifest));
  copy_others(from, write);
  for (const auto& file : small.files()) *manifest.add_files() = file;
  const std::string sealed = seal(manifest);
  unseal(sealed, join_path(folder.path(), kManifestName));
  write(kManifestName, sealed);
  sync_and_close(std::move(written));
  folder.commit();
  make_run(files, request.output, request.config);
}

void export_weights(FileSystem& files, const Checkpoint& from, const ReshardRequest& request) {
  from.verify_files();
  SafetensorsMetadata metadata = metadata_of(from, request.config);
  metadata["step"] = std::to_string(from.manifest().facts().step());
  metadata["format"] = "pt";
  const PlannedState planned({.output = request.output,
                              .layout = RankLayout(1, 1, request.layout.experts()),
                              .sizes = request.sizes,
                              .config = request.config},
                             0);
  const std::string other = from.differences(planned.store());
  check(other.empty(), from.path(), ": does not fit its own settings:", other);
  NewFolder folder(files, request.output, bytes_of(from) / 3);
  ShardReport unused;
  write_shard(
      files, folder.path(),
      {.name = "model.safetensors", .pieces = held_values(planned.store()), .metadata = metadata},
      [&](const StatePiece& part) { from.read(part); }, unused);
  folder.commit();
}

}  // namespace moemamba
