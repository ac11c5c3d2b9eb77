#include "runtime/process_facts.h"

#include <cstdlib>
#include <fstream>
#include <sstream>

#include "core/error.h"

namespace moemamba {

namespace {

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// What follows the process's name, which may hold anything.
std::string stat_of(int64_t pid) {
  const std::string line = first_line(concat("/proc/", pid, "/stat"));
  const size_t name_end = line.rfind(')');
  return name_end == std::string::npos ? "" : line.substr(name_end + 1);
}

}  // namespace

char process_state(int64_t pid) {
  const std::string stat = stat_of(pid);
  return stat.size() > 1 ? stat[1] : '\0';
}

int64_t process_start(int64_t pid) {
  const std::string stat = stat_of(pid);
  if (stat.empty()) return 0;
  std::istringstream fields(stat);
  std::string field;
  fields >> field;
  if (field == "Z" || field == "X") return 0;
  for (int i = 4; i <= 22; ++i) fields >> field;
  return std::atoll(field.c_str());
}

std::string boot_id() {
  return first_line("/proc/sys/kernel/random/boot_id");
}

}  // namespace moemamba
