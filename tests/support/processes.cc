#include "tests/support/processes.h"

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>

namespace moemamba {

std::string words_of(pid_t id, const char* what) {
  std::ifstream file("/proc/" + std::to_string(id) + "/" + what, std::ios::binary);
  std::ostringstream words;
  words << file.rdbuf();  // of one that ends meanwhile: nothing
  return words.str();
}

std::vector<pid_t> processes_with(const std::string& mark) {
  std::vector<pid_t> found;
  for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
    const pid_t id = std::atoi(entry.path().filename().c_str());
    if (id > 0 && words_of(id, "cmdline").find(mark) != std::string::npos) found.push_back(id);
  }
  return found;
}

Processes find_processes(const std::string& mark) {
  Processes processes;
  std::map<int, pid_t> by_rank;
  for (pid_t id : processes_with(mark)) {
    const std::string program = words_of(id, "comm");
    if (program == "mpirun\n") processes.mpiruns.push_back(id);
    if (program != "moemamba\n") continue;  // the shell
    const std::string name = "OMPI_COMM_WORLD_RANK=", environment = words_of(id, "environ");
    const size_t at = environment.find(name);
    if (at == std::string::npos)
      processes.launchers.push_back(id);
    else
      by_rank[std::atoi(environment.c_str() + at + name.size())] = id;
  }
  for (const auto& [rank, id] : by_rank) processes.ranks.push_back(id);
  return processes;
}

}  // namespace moemamba
