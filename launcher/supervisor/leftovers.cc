#include "launcher/supervisor/leftovers.h"

#include <sys/stat.h>
#include <unistd.h>

#include <charconv>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "core/error.h"

namespace moemamba {

namespace {

namespace fs = std::filesystem;

std::string value_in(const std::string& environment, const std::string& name) {
  const std::string mark = std::string(1, '\0') + name + "=";
  const std::string all = std::string(1, '\0') + environment;
  const size_t at = all.find(mark);
  if (at == std::string::npos) return "";
  const size_t begin = at + mark.size();
  return all.substr(begin, all.find('\0', begin) - begin);
}

std::string host_name() {
  char host[256] = {};
  gethostname(host, sizeof host - 1);
  return host;
}

// A session folder is "ompi.HOST.USER/NAME": nothing else is ever removed.
bool is_session(const fs::path& path) {
  const std::string parent = path.parent_path().filename().string();
  return path.is_absolute() && parent.rfind("ompi.", 0) == 0 && !path.filename().empty() &&
         path.lexically_normal() == path;
}

// Of all ranks of one job of this user: behind it the rank's number comes.
bool is_segment(const std::string& name) {
  const std::string own = concat("vader_segment.", host_name(), ".", getuid(), ".");
  return name.rfind(own, 0) == 0 && name.size() > own.size() + 1 && name.back() == '.' &&
         name.find('/') == std::string::npos;
}

bool is_own(const fs::path& path) {
  struct stat facts {};
  return lstat(path.c_str(), &facts) == 0 && facts.st_uid == getuid();
}

}  // namespace

void Leftovers::learn_from_rank(pid_t pid) {
  std::ifstream file(concat("/proc/", pid, "/environ"), std::ios::binary);
  const std::string environment{std::istreambuf_iterator<char>(file), {}};
  const std::string folder = value_in(environment, "OMPI_MCA_orte_jobfam_session_dir");
  if (is_session(folder)) folders_.insert(folder);
  const std::string job = value_in(environment, "PMIX_NAMESPACE");
  uint32_t number = 0;
  const auto read = std::from_chars(job.data(), job.data() + job.size(), number);
  if (read.ec != std::errc() || read.ptr != job.data() + job.size()) return;
  char segment[512];
  std::snprintf(segment, sizeof segment, "vader_segment.%s.%u.%x.", host_name().c_str(),
                unsigned(getuid()), number);
  segments_.insert(segment);
}

void Leftovers::learn_from_launcher(pid_t pid) {
  for (const char* name : {"TMPDIR", "TEMP", "TMP"}) {
    const char* base = std::getenv(name);
    if (!base && std::string(name) == "TMP") base = "/tmp";
    if (!base) continue;
    folders_.insert(concat(base, "/ompi.", host_name(), ".", getuid(), "/pid.", pid));
    return;
  }
}

void Leftovers::save(FileSystem& files, const std::string& file) const {
  std::string text;
  for (const auto* names : {&folders_, &segments_})
    for (const std::string& name : *names) text += name + "\n";
  write_file(files, file, text);
}

void Leftovers::learn_from_file(const std::string& file) {
  std::ifstream lines(file);
  for (std::string line; std::getline(lines, line);) {
    if (is_session(line)) folders_.insert(line);
    if (is_segment(line)) segments_.insert(line);
  }
}

void Leftovers::spare(const Leftovers& others) {
  for (const std::string& folder : others.folders_) folders_.erase(folder);
  for (const std::string& segment : others.segments_) segments_.erase(segment);
}

void Leftovers::remove() {
  std::error_code ignored;
  for (const std::string& folder : folders_)
    if (is_session(folder) && is_own(folder)) fs::remove_all(folder, ignored);
  for (fs::directory_iterator at("/dev/shm", ignored), end; !ignored && at != end;
       at.increment(ignored)) {
    const std::string name = at->path().filename().string();
    const std::string job = name.substr(0, name.rfind('.') + 1);
    std::error_code failed;
    if (segments_.count(job) > 0 && is_own(at->path())) fs::remove(at->path(), failed);
  }
  folders_.clear();
  segments_.clear();
}

}  // namespace moemamba
