#include "runtime/checkpoint_writer.h"

#include <algorithm>
#include <cstring>

#include "core/error.h"
#include "parallel/gather_blobs.h"
#include "runtime/checkpoint_digests.h"
#include "runtime/checkpoint_parts.h"
#include "runtime/manifest.h"

namespace moemamba {

namespace {

// Within an attempt: what becomes the checkpoint where it is published by links. No file of a
// manifest begins with a dot.
constexpr const char* kHalfName = ".half";

}  // namespace

CheckpointWriter::CheckpointWriter(FileSystem& files, ProcessGroups& groups,
                                   const ParameterStore& store, Options options)
    : files_(files),
      groups_(groups),
      options_(std::move(options)),
      stream_(Stream::immediate()),
      sources_(written_pieces(store)) {
  for (const StatePiece& piece : sources_) state_bytes_ += (piece.end - piece.begin) * 4;
  staging_ = Buffer::staging(groups.device, staging_bytes(sources_));
  staged_ = staged_in(staging_.data(), sources_);
  if (groups.device == DeviceKind::cuda) copies_.emplace(Stream::cuda());
}

Event CheckpointWriter::stage(Stream* compute) {
  if (copies_) copies_->wait(compute->record());
  for (size_t i = 0; i < sources_.size(); ++i) {
    const int64_t count = sources_[i].end - sources_[i].begin;
    float *from = sources_[i].data, *to = staged_[i].data;
    if (copies_)
      copy(*copies_, view(from, {count}, DType::f32, groups_.device), view(to, {count}));
    else
      std::memcpy(to, from, size_t(count) * sizeof(float));
  }
  if (copies_) copied_ = copies_->record();
  return copied_;
}

// Rank 0 makes the attempt's folder; all ranks get its path, or why there is none.
std::string CheckpointWriter::begin(const CheckpointFacts& facts, std::string& attempt) {
  // What all ranks will write; a twentieth and 64 KiB more for headers and what else a disk takes.
  int64_t sum = state_bytes_;
  std::vector<int64_t> sizes(size_t(groups_.layout.ranks()));
  all_reduce_sum(*groups_.checkpoint, stream_, view(&sum, {1}),
                 view(sizes.data(), {groups_.layout.ranks(), 1}));
  stream_.synchronize();
  std::string problem;
  if (groups_.rank == 0) {
    try {
      const std::string folder = checkpoints_folder(options_.run);
      check(!options_.may_write || options_.may_write(), "another launch has taken over this run");
      files_.make_folders(folder);
      files_.sync_folder(options_.run);  // or a power cut takes the folder with all that is in it
      const std::string place = join_path(folder, checkpoint_name(facts.step));
      if (is_half_published(options_.run, facts.step))  // by a stale owner, since we have loaded
        files_.rename(place, damaged_place(options_.run, facts.step, options_.generation));
      check(!file_exists(place), folder, ": a checkpoint of step ", facts.step,
            " is there already");
      const int64_t room = files_.free_bytes(folder), needed = sum + sum / 20 + (1 << 16);
      check(room >= needed, folder, ": the disk has ", room, " bytes left, a checkpoint takes ",
            needed);
      attempt = join_path(folder, attempt_name(facts.step, options_.generation, fresh_nonce()));
      files_.make_folder(attempt);
    } catch (const std::exception& error) {
      problem = concat("rank 0: ", error.what());
    }
  }
  const std::string answer =
      broadcast_blob(*groups_.checkpoint, stream_, problem.empty() ? "+" + attempt : problem);
  if (answer.rfind('+', 0) != 0) return answer;
  attempt = answer.substr(1);
  return "";
}

ShardReport CheckpointWriter::write_state(const CheckpointFacts& facts,
                                          const std::string& attempt) {
  ShardReport report;
  const int rank = groups_.rank;
  try {
    write_shards(files_, attempt, shards_of(staged_, rank, groups_.layout.ranks(), facts.metadata),
                 {.block_bytes = options_.block_bytes,
                  .digest_threads = digest_threads(groups_.ranks_of_machine)},
                 report);
  } catch (const std::exception& error) {
    report.set_problem(concat("rank ", rank, ": ", error.what()));
  }
  return report;
}

CheckpointManifest CheckpointWriter::merge(const CheckpointFacts& facts,
                                           const std::vector<std::string>& reports) {
  CheckpointManifest manifest;
  manifest.set_format(kManifestFormat);
  manifest.set_run_id(facts.run_id);
  manifest.set_generation(options_.generation);
  manifest.set_step(facts.step);
  manifest.set_ranks(groups_.layout.ranks());
  manifest.set_expert_ranks(groups_.layout.expert_size());
  manifest.set_experts(groups_.layout.experts());
  manifest.set_config(facts.config);
  manifest.set_tokenizer(facts.tokenizer);
  manifest.set_next_sample(facts.next_sample);
  manifest.set_loss(facts.loss);
  manifest.set_chain(facts.chain);
  manifest.set_build(facts.build);
  merge_reports(reports, manifest);
  return manifest;
}

void CheckpointWriter::write_manifest(const CheckpointFacts& facts, const std::string& attempt,
                                      CheckpointManifest manifest) {
  ShardReport small;
  std::vector<std::unique_ptr<OutputFile>> written;
  const auto write = [&](const std::string& name, const std::string& content) {
    written.push_back(write_small_file(files_, attempt, name, content, small));
  };
  write(kIndexName, weights_index(manifest));
  for (const auto& [name, content] : facts.extra_files) write(name, content);
  for (const auto& file : small.files()) *manifest.add_files() = file;
  const std::string sealed = seal(manifest);
  unseal(sealed, join_path(attempt, kManifestName));  // what cannot be read must not be committed
  write(kManifestName, sealed);
  sync_and_close(std::move(written));
  files_.sync_folder(attempt);
}

// The one instant at which the checkpoint comes to be.
void CheckpointWriter::publish(const CheckpointFacts& facts, const std::string& attempt) {
  check(!options_.may_write || options_.may_write(),
        "another launch has taken over this run; this checkpoint is not committed");
  const std::string folder = checkpoints_folder(options_.run);
  const std::string place = join_path(folder, checkpoint_name(facts.step));
  if (!files_.rename_new(attempt, place)) publish_by_links(attempt, place);
  files_.sync_folder(folder);
}

// Where the file system has no rename that fails on an existing name (NFS): a folder with links to
// all files is made within the attempt and renamed, which fails where a folder with anything in it
// has that name; then the manifest is linked, without which a folder is no checkpoint. Once the
// attempt has been moved away, neither is possible. Where that fails halfway the attempt stays as
// well: fence_attempts() knows by it what the folder is. It is not deleted here: a name may be
// another launch's by now.
void CheckpointWriter::publish_by_links(const std::string& attempt, const std::string& place) {
  const Manifest manifest =
      unseal(read_file(join_path(attempt, kManifestName)), join_path(attempt, kManifestName));
  const std::string half = join_path(attempt, kHalfName);
  files_.make_folder(half);
  for (const auto& file : manifest.files())
    files_.link(join_path(attempt, file.name()), join_path(half, file.name()));
  files_.sync_folder(half);
  files_.sync_folder(checkpoints_folder(options_.run));  // no half without its attempt
  files_.rename(half, place);
  files_.link(join_path(attempt, kManifestName), join_path(place, kManifestName));
  files_.sync_folder(place);
}

// Rank 0, when all have voted: what becomes of the attempt.
std::string CheckpointWriter::conclude(const CheckpointFacts& facts, const std::string& attempt,
                                       const std::vector<std::string>& reports) {
  std::string problem;
  try {
    write_manifest(facts, attempt, merge(facts, reports));
    publish(facts, attempt);
  } catch (const std::exception& error) {
    problem = *error.what() ? error.what() : "unknown";
  }
  try {  // gone by its rename, if all went well
    if (!is_half_published(options_.run, facts.step)) remove_tree(files_, attempt);
  } catch (const std::exception&) {  // its name says what it is; the next launch deletes it
  }
  return problem;
}

std::string CheckpointWriter::write(const CheckpointFacts& facts) {
  std::string attempt;
  std::string problem = begin(facts, attempt);
  if (!problem.empty()) return problem;
  Stream::wait_on_host(copied_);
  const ShardReport report = write_state(facts, attempt);
  const std::vector<std::string> reports =
      gather_blobs(*groups_.checkpoint, stream_, report.SerializeAsString());
  if (groups_.rank == 0) problem = conclude(facts, attempt, reports);
  return broadcast_blob(*groups_.checkpoint, stream_, problem);
}

}  // namespace moemamba
