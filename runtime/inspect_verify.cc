#include <algorithm>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>

#include "core/digest.h"
#include "core/error.h"
#include "runtime/checkpoint_parts.h"
#include "runtime/checkpoint_shard.h"
#include "runtime/inspect.h"
#include "runtime/state_hash.h"

namespace moemamba {

namespace {

namespace fs = std::filesystem;

constexpr size_t kMostProblems = 1000;
constexpr size_t kChunk = 1 << 20;  // bytes read at once

// One checkpoint under examination: every step notes its problems and the next one goes on.
class Examination {
 public:
  explicit Examination(const std::string& path) { verdict_.path = path; }

  CheckpointVerdict examine() {
    attempt([&] { open_manifest(); });
    if (manifest_.files_size() == 0) {
      if (verdict_.problems.empty()) object(verdict_.path, ": the manifest names no files");
      return verdict_;
    }
    attempt([&] { cut_pieces(); });
    bool readable = true;
    for (int i = 0; i < manifest_.files_size(); ++i) {
      const bool there = attempt([&] { check_bytes(manifest_.files(i)); });
      readable = there && readable;
      if (there && !of_file_[size_t(i)].empty()) attempt([&] { check_shard(i); });
    }
    attempt([&] { check_index(); });
    if (readable) attempt([&] { check_state(); });
    note_strangers();
    return verdict_;
  }

 private:
  template <class... Parts>
  void object(const Parts&... parts) {
    if (verdict_.problems.size() < kMostProblems) verdict_.problems.push_back(concat(parts...));
  }
  template <class Act>
  bool attempt(Act&& act) {
    try {
      act();
      return true;
    } catch (const std::exception& error) {
      object(error.what());
      return false;
    }
  }
  std::string path_of(const std::string& name) const { return join_path(verdict_.path, name); }

  void open_manifest() {
    const std::string path = path_of(kManifestName);
    const InputFile file(path);
    check(file.bytes() <= 64 << 20, path, ": ", file.bytes(), " bytes; a manifest is smaller");
    std::string bytes(size_t(file.bytes()), '\0');
    file.read_at(0, bytes.data(), bytes.size());
    manifest_ = unseal(std::move(bytes), path);
    verdict_.step = manifest_.facts().step();
    verdict_.files = manifest_.files_size();
    verdict_.tensors = manifest_.tensors_size();
    verdict_.bytes = file.bytes();
    const auto step = step_of_name(fs::path(verdict_.path).lexically_normal().filename().string());
    check(!step || *step == verdict_.step, path, ": is of step ", verdict_.step);
  }

  // The manifest's pieces, by the file in which they lie.
  void cut_pieces() {
    of_file_.resize(size_t(manifest_.files_size()));
    for (const auto& tensor : manifest_.tensors()) {
      StatePiece piece{.tensor = tensor.name(), .shape = tensor.shape()};
      const auto add = [&](StateKind kind, const Manifest::Pieces& pieces) {
        for (const Manifest::Piece& part : pieces) {
          piece.kind = kind;
          piece.begin = part.begin();
          piece.end = part.end();
          of_file_[size_t(part.file())].push_back({piece, part.offset()});
        }
      };
      add(StateKind::value, tensor.value());
      add(StateKind::exp_avg, tensor.exp_avg());
      add(StateKind::exp_avg_sq, tensor.exp_avg_sq());
    }
  }

  // On purpose not sha256_of_files(): the kernels that saves and loads share are no witnesses of
  // each other.
  void check_bytes(const Manifest::File& file) {
    const InputFile there(path_of(file.name()));
    check(there.bytes() == file.bytes(), there.path(), ": ", there.bytes(), " bytes, expected ",
          file.bytes());
    Sha256 digest;
    std::vector<char> chunk(std::min<size_t>(kChunk, size_t(there.bytes())));
    for (int64_t at = 0; at < there.bytes();) {
      const size_t bytes = std::min<size_t>(kChunk, size_t(there.bytes() - at));
      there.read_at(at, chunk.data(), bytes);
      digest.add(chunk.data(), bytes);
      at += int64_t(bytes);
    }
    verdict_.bytes += there.bytes();
    const std::string found = digest.hex(), expected = hex_of_bytes(file.sha256());
    if (found != expected)
      object(there.path(), ": damaged: SHA-256 ", found, ", the manifest says ", expected);
  }

  // A shard's own header says what the manifest says of it.
  void check_shard(int index) {
    const Manifest::File file = manifest_.files(index);
    const SafetensorsReader reader(path_of(file.name()), Links::refused);
    const auto& tensors = reader.tensors();
    const int64_t start = file.bytes() - (tensors.empty() ? 0 : tensors.back().end);
    const auto& pieces = of_file_[size_t(index)];
    if (tensors.size() != pieces.size())
      object(reader.path(), ": its header names ", tensors.size(), " tensors, the manifest ",
             pieces.size());
    for (const auto& [piece, offset] : pieces) {
      const StoredTensor expected = stored_tensor(piece);
      const StoredTensor* found = reader.find(expected.name);
      if (!found)
        object(reader.path(), ": no ", expected.name, " in its header, the manifest has it");
      else if (found->dtype != expected.dtype || !(found->shape == expected.shape) ||
               start + found->begin != offset)
        object(reader.path(), ": ", expected.name, ": ", name_of(found->dtype), " ",
               to_string(found->shape), " at byte ", start + found->begin, ", the manifest says ",
               name_of(expected.dtype), " ", to_string(expected.shape), " at byte ", offset);
    }
    const auto config = reader.metadata().find("config");
    if (config != reader.metadata().end() && config->second != manifest_.facts().config())
      object(reader.path(), ": the settings in its header are not the manifest's");
  }

  void check_index() {
    const std::string path = path_of(kIndexName);
    const InputFile file(path);
    const auto expected = nlohmann::json::parse(weights_index(manifest_));
    check(file.bytes() <= int64_t(64) << 20, path, ": ", file.bytes(), " bytes are no index");
    std::string text(size_t(file.bytes()), '\0');
    file.read_at(0, text.data(), text.size());
    check(nlohmann::json::parse(text, nullptr, false) == expected, path,
          ": does not say where the manifest has the tensors");
  }

  void check_state() {
    uint64_t hash = 0;
    std::vector<float> buffer;
    for (int i = 0; i < manifest_.files_size(); ++i) {
      if (of_file_[size_t(i)].empty()) continue;
      const InputFile file(path_of(manifest_.files(i).name()));
      for (const auto& [piece, offset] : of_file_[size_t(i)])
        for_parts(piece, buffer, [&, first = piece.begin, from = offset](const StatePiece& part) {
          file.read_at(from + (part.begin - first) * 4, part.data,
                       size_t(part.end - part.begin) * 4);
          hash += state_hash_of({part});
        });
    }
    const uint64_t said = manifest_.facts().state_hash();
    check(hash == said, verdict_.path, ": its values and moments have the hash ",
          state_hash_text(hash), ", the manifest says ", state_hash_text(said));
  }

  void note_strangers() {
    std::error_code error;
    for (fs::directory_iterator at(verdict_.path, error), end; !error && at != end;
         at.increment(error)) {
      const std::string name = at->path().filename().string();
      bool known = name == kManifestName;
      for (const auto& file : manifest_.files()) known = known || file.name_view() == name;
      if (!known) verdict_.notes.push_back(concat(path_of(name), ": not in the manifest"));
    }
  }

  Manifest manifest_;
  CheckpointVerdict verdict_;
  std::vector<std::vector<std::pair<StatePiece, int64_t>>> of_file_;  // with the byte's offset
};

}  // namespace

CheckpointVerdict verify_checkpoint(const std::string& path) {
  return Examination(path).examine();
}

}  // namespace moemamba
