#include "runtime/run_folder.h"

#include <filesystem>
#include <vector>

#include "core/error.h"

namespace moemamba {
namespace {

constexpr const char* kConfigName = "config.textproto";

void empty_folder(FileSystem& files, const std::string& folder) {
  // The mark of a run goes last: a folder that was emptied halfway can be emptied again.
  std::vector<std::string> found;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder))
    if (entry.path() != std::filesystem::path(folder) / kConfigName)
      found.push_back(entry.path().string());
  for (size_t i = found.size(); i-- > 0;) files.remove(found[i]);  // children before their folders
  files.remove(join_path(folder, kConfigName));
}

}  // namespace

std::string claim_run_folder(FileSystem& files, const std::string& folder,
                             std::string_view config_text, bool overwrite) {
  check(!folder.empty(), "expected the name of a run's folder, found none");
  files.make_folders(folder);
  const std::string config = join_path(folder, kConfigName);
  if (file_exists(config)) {
    check(overwrite, folder, " already holds a run; choose another --run or set ",
          "--overwrite=true to replace it");
    empty_folder(files, folder);
  }
  check(std::filesystem::is_empty(folder), folder, " holds files that are no run's (there is no ",
        kConfigName, "); choose another --run or empty it yourself");
  write_file(files, config, config_text);
  return folder;
}

}  // namespace moemamba
