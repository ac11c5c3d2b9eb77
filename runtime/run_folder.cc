#include "runtime/run_folder.h"

#include <filesystem>
#include <vector>

#include "core/error.h"

namespace moemamba {
namespace {

namespace fs = std::filesystem;

constexpr const char* kConfigName = "config.textproto";
constexpr const char* kConfigDraft = "config.textproto.tmp";  // of a launch that died
constexpr const char* kLeaseName = "lease";
// Of a launch: its supervisor, which works on the run while that is given up, and its events.
constexpr const char* kSupervisorName = "supervisor";
constexpr const char* kEventsName = "events.jsonl";
// What the settings of a run are called that is being overwritten. Where they are, all else in the
// folder is to be deleted, whatever it looks like.
constexpr const char* kGivenUpName = "config.textproto.overwritten";

bool is_given_up(const std::string& folder) {
  return file_exists(join_path(folder, kGivenUpName));
}

// The mark goes last, when nothing that it speaks of can come back: a folder that was emptied
// halfway is emptied by the next launch.
void empty_folder(FileSystem& files, const std::string& folder) {
  std::vector<std::string> found;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    if (name != kGivenUpName && name != kLeaseName && name != kSupervisorName)
      found.push_back(entry.path().string());
  }
  for (const std::string& path : found) {
    if (fs::is_directory(fs::symlink_status(path)))
      remove_tree(files, path);
    else
      files.remove(path);
  }
  files.sync_folder(folder);
  files.remove(join_path(folder, kGivenUpName));
  files.sync_folder(folder);
}

// The instant at which the run is there no more.
void give_up(FileSystem& files, const std::string& folder) {
  files.rename(join_path(folder, kConfigName), join_path(folder, kGivenUpName));
  files.sync_folder(folder);
}

}  // namespace

std::string taken_text(const std::string& folder, const std::string& reason) {
  return concat(folder, " already holds a run; choose another --run or set --overwrite=true to ",
                "replace it", reason.empty() ? "" : "; " + reason);
}

bool holds_run(const std::string& folder) {
  check(!folder.empty(), "expected the name of a run's folder, found none");
  if (!file_exists(folder)) return false;
  check(fs::is_directory(folder), folder, ": cannot make folder: a file is in its place");
  if (is_given_up(folder)) return false;
  if (file_exists(join_path(folder, kConfigName))) return true;
  std::error_code error;
  for (fs::directory_iterator at(folder, error), end; !error && at != end; at.increment(error)) {
    const fs::path name = at->path().filename();
    check(name == kLeaseName || name == kConfigDraft || name == kSupervisorName ||
              name == kEventsName,
          folder, " holds files that are no run's (there is no ", kConfigName,
          "); choose another --run or empty it yourself");
  }
  check(!error, folder, ": cannot be read: ", error.message());
  return false;
}

std::string claim_run_folder(FileSystem& files, const std::string& folder,
                             std::string_view config_text, bool overwrite) {
  if (holds_run(folder)) {
    check(overwrite, taken_text(folder));
    give_up(files, folder);
  }
  if (is_given_up(folder)) empty_folder(files, folder);
  make_lasting_folders(files, folder);
  write_file(files, join_path(folder, kConfigName), config_text);
  try {
    files.sync_folder(folder_of(folder));  // a power cut leaves the folder itself
  } catch (const Error&) {  // not ours to open: then it lasts when the system gets to it
  }
  return folder;
}

}  // namespace moemamba
