#include "runtime/weights_files.h"

#include <filesystem>
#include <map>

#include "core/error.h"
#include "runtime/checkpoint_folder.h"
#include "runtime/checkpoint_parts.h"
#include "runtime/json_reader.h"
#include "runtime/manifest.h"

namespace moemamba {

namespace {

namespace fs = std::filesystem;

// A crash between the two renames of save_weights leaves the weights before under their old name.
std::string whole_folder(const std::string& folder) {
  const std::string old = old_weights(folder);
  return !fs::exists(folder) && fs::is_directory(old) ? old : folder;
}

std::string folder_of_weights(const std::string& path) {
  const std::string inner = whole_folder(join_path(path, "weights"));
  if (fs::is_directory(inner)) return inner;
  // A run that has not ended has its weights in checkpoints alone.
  const std::vector<CheckpointPlace> checkpoints = list_checkpoints(path);
  return checkpoints.empty() ? whole_folder(path) : checkpoints.front().path;
}

using Opened = std::map<std::string, SafetensorsReader, std::less<>>;

// Opens it unless it is open. So no index can name more than there is.
void open_named(const std::string& folder, const std::string& index, std::string_view name,
                Opened& opened) {
  if (opened.find(name) != opened.end()) return;
  const std::string_view shown = name.substr(0, 128);
  check(name.find('/') == std::string_view::npos, index, ": the file ", shown,
        " leaves the folder; expected files beside the index");
  check(is_plain_name(name), index, ": a file is called \"", shown,
        "\"; expected letters, digits, '.', '_' and '-', at most 128");
  const std::string path = join_path(folder, std::string(name));
  opened.emplace(name, SafetensorsReader(path, Links::refused));
}

}  // namespace

std::string old_weights(const std::string& folder) { return folder + ".old"; }

std::vector<SafetensorsReader> open_index(const std::string& folder) {
  const MappedFile index(join_path(folder, kIndexName));
  JsonReader json(index.text(), index.path() + ": not an index of safetensors files");
  Opened opened;
  bool found = false;
  json.object([&](std::string_view key) {
    if (key != "weight_map") return json.skip();
    found = true;
    json.object([&](std::string_view) {
      const std::string_view name = json.string();
      check(name.size() <= 1000, index.path(), ": a file's name has ", name.size(), " bytes");
      open_named(folder, index.path(), unescaped(name), opened);
    });
  });
  json.end();
  check(found && !opened.empty(), index.path(),
        ": not an index of safetensors files; expected \"weight_map\": {TENSOR: FILE, ...}");
  std::vector<SafetensorsReader> readers;
  readers.reserve(opened.size());
  for (auto& [name, reader] : opened) readers.push_back(std::move(reader));
  return readers;
}

std::vector<SafetensorsReader> open_weights(const std::string& path) {
  std::vector<SafetensorsReader> readers;
  if (fs::is_regular_file(path)) {
    readers.emplace_back(path);
    return readers;
  }
  const std::string folder = folder_of_weights(path);
  if (file_exists(join_path(folder, kIndexName))) return open_index(folder);
  const std::string single = join_path(folder, "model.safetensors");
  check(file_exists(single), path,
        ": no weights here; expected a run's folder, a folder with "
        "model.safetensors or model.safetensors.index.json, or a .safetensors file");
  readers.emplace_back(single);
  return readers;
}

}  // namespace moemamba
