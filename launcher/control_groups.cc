#include "launcher/control_groups.h"

#include <algorithm>
#include <fstream>
#include <sstream>

namespace moemamba {

namespace {

// The folders of the groups of a controller of version 1, or of version 2 where it is empty, from
// the process' own up to the root.
std::vector<std::string> group_folders(const std::string& controller) {
  std::ifstream file("/proc/self/cgroup");
  std::vector<std::string> folders;
  for (std::string line; std::getline(file, line);) {  // "4:cpu,cpuacct:/path", "0::/path"
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string names = "," + line.substr(first + 1, second - first - 1) + ",";
    if (controller.empty() ? names != ",," : names.find("," + controller + ",") == names.npos)
      continue;
    const std::string root = "/sys/fs/cgroup" + (controller.empty() ? "" : "/" + controller);
    for (std::string path = line.substr(second + 1); path.size() > 1; path.resize(path.rfind('/')))
      folders.push_back(root + path);
    folders.push_back(root);
  }
  return folders;
}

// "max" is none.
std::optional<int64_t> number_in(const std::string& path) {
  std::ifstream file(path);
  int64_t number = 0;
  if (file >> number) return number;
  return std::nullopt;
}

template <class Number>
void keep_least(std::optional<Number>& least, Number number) {
  least = least ? std::min(*least, number) : number;
}

}  // namespace

std::optional<int64_t> group_memory_limit() {
  constexpr int64_t kUnlimited = int64_t(1) << 60;  // version 1 says so with a number above
  std::optional<int64_t> least;
  const auto take = [&](const std::string& path) {
    const std::optional<int64_t> bytes = number_in(path);
    if (bytes && *bytes > 0 && *bytes < kUnlimited) keep_least(least, *bytes);
  };
  for (const std::string& folder : group_folders("")) take(folder + "/memory.max");
  for (const std::string& folder : group_folders("memory")) take(folder + "/memory.limit_in_bytes");
  return least;
}

std::optional<double> group_core_limit() {
  std::optional<double> least;
  for (const std::string& folder : group_folders("")) {
    std::ifstream file(folder + "/cpu.max");
    int64_t quota = 0, period = 0;
    if (file >> quota >> period && quota > 0 && period > 0)
      keep_least(least, double(quota) / double(period));
  }
  for (const std::string& folder : group_folders("cpu")) {
    const auto quota = number_in(folder + "/cpu.cfs_quota_us");  // -1: none
    const auto period = number_in(folder + "/cpu.cfs_period_us");
    if (quota && *quota > 0 && period && *period > 0)
      keep_least(least, double(*quota) / double(*period));
  }
  return least;
}

}  // namespace moemamba
