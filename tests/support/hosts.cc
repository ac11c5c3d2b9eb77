#include "tests/support/hosts.h"

#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>

#include "core/error.h"
#include "core/file.h"
#include "runtime/process_facts.h"
#include "tests/support/processes.h"

namespace moemamba {

namespace {

namespace fs = std::filesystem;
constexpr const char* kSpaces = "/run/netns/";
constexpr const char* kNames = "/run/moemamba-hosts/";  // a host's name is a file that is mounted
constexpr const char* kFiles = "/etc/netns/";           // what `ip netns exec` shows in /etc
constexpr const char* kMark = "moemamba-";

struct Said {
  int code = 0;
  std::string text;
};
Said run(const std::string& command) {
  Said said;
  FILE* pipe = popen((command + " 2>&1").c_str(), "r");
  check(pipe != nullptr, "cannot start a shell for: ", command);
  std::array<char, 512> part;
  while (std::fgets(part.data(), part.size(), pipe)) said.text += part.data();
  const int status = pclose(pipe);
  said.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  return said;
}

void must(const std::string& command) {
  const Said said = run(command);
  check(said.code == 0, command, ": exit code ", said.code, ": ", said.text);
}

// Of a namespace's file, or of a process's link; 0: it is not there.
ino_t inode(const std::string& path) {
  struct stat facts {};
  return stat(path.c_str(), &facts) == 0 ? facts.st_ino : 0;
}

std::vector<pid_t> processes_of_space(const std::string& space) {
  std::vector<pid_t> found;
  const ino_t wanted = inode(kSpaces + space);
  if (wanted == 0) return found;
  for (const auto& entry : fs::directory_iterator("/proc")) {
    const pid_t id = std::atoi(entry.path().filename().c_str());
    if (id > 0 && inode(entry.path() / "ns/net") == wanted && process_start(id) != 0)
      found.push_back(id);
  }
  return found;
}

void remove_space(const std::string& space) {
  for (int round = 0; round < 500; ++round) {
    const std::vector<pid_t> there = processes_of_space(space);
    if (there.empty()) break;
    for (pid_t id : there) kill(id, SIGKILL);
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  run("ip netns del " + space);
  run("umount " + (kNames + space));
  std::error_code ignored;
  fs::remove(kNames + space, ignored);
  fs::remove_all(kFiles + space, ignored);
}

std::vector<std::string> spaces_with(const std::string& prefix) {
  std::vector<std::string> spaces;
  std::error_code none;
  for (const auto& entry : fs::directory_iterator(kSpaces, none))
    if (entry.path().filename().string().rfind(prefix, 0) == 0)
      spaces.push_back(entry.path().filename());
  return spaces;
}

// "moemamba-PID-START-...": of a process that died before its destructors.
void remove_those_of_the_dead() {
  for (const std::string& space : spaces_with(kMark)) {
    std::istringstream words(space.substr(std::string(kMark).size()));
    int64_t pid = 0, started = 0;
    char dash = 0;
    if (words >> pid >> dash >> started && process_start(pid) != started) remove_space(space);
  }
}

}  // namespace

std::string Hosts::cannot_be_made() {
  if (getuid() != 0) return "hosts cannot be made here: network namespaces need root";
  for (const char* tool : {"ip", "unshare", "nsenter", "mpirun"})
    if (run(std::string("command -v ") + tool).code != 0)
      return concat("hosts cannot be made here: ", tool, " is not installed");
  const std::string space = concat(kMark, getpid(), "-", process_start(getpid()), "-try");
  const Said made =
      run("ip netns add " + space + " && ip -n " + space + " link add wire type bridge && ip -n " +
          space + " link add one type veth peer name two && unshare --uts true");
  remove_space(space);
  return made.code == 0 ? "" : "hosts cannot be made here: " + made.text;
}

Hosts::Hosts(const std::string& folder, int hosts, int slots)
    : folder_(join_path(folder, "hosts")), count_(hosts), slots_(slots) {
  check(hosts >= 1 && hosts <= 100, "1 to 100 hosts, not ", hosts);
  remove_those_of_the_dead();
  int number = 0;
  do prefix_ = concat(kMark, getpid(), "-", process_start(getpid()), "-", number++, "-");
  while (!spaces_with(prefix_).empty());
  try {
    make();
  } catch (...) {
    for (const std::string& space : spaces_with(prefix_)) remove_space(space);
    throw;
  }
}

Hosts::~Hosts() {
  for (const std::string& space : spaces_with(prefix_)) remove_space(space);
}

std::string Hosts::name(int host) const {
  return concat("h", host);
}
std::string Hosts::address(int host) const {
  return concat("10.77.0.", host + 1);
}
std::string Hosts::hostfile() const {
  return join_path(folder_, "hostfile");
}
std::string Hosts::space(int host) const {
  return prefix_ + (host < 0 ? std::string("wire") : name(host));
}

void Hosts::make() {
  fs::create_directories(folder_);
  fs::create_directories(kNames);
  must("ip netns add " + space(-1));
  must("ip -n " + space(-1) + " link add wire type bridge");
  must("ip -n " + space(-1) + " link set wire up");
  std::ofstream list(hostfile());
  for (int host = 0; host < count_; ++host) {
    make_host(host);
    list << name(host) << " slots=" << slots_ << "\n";
  }
  write_agent();
}

void Hosts::make_host(int host) {
  const std::string there = "ip -n " + space(host) + " ", switchboard = "ip -n " + space(-1) + " ";
  must("ip netns add " + space(host));
  must(there + "link set lo up");
  must(switchboard + "link add " + name(host) + " type veth peer name wire netns " + space(host));
  must(switchboard + "link set " + name(host) + " master wire up");
  must(there + "addr add " + address(host) + "/24 dev wire");
  must(there + "link set wire up");
  const std::string named = kNames + space(host);
  std::ofstream(named).close();
  must("unshare --uts=" + named + " hostname " + name(host));
  fs::create_directories(kFiles + space(host));
  std::ofstream known(kFiles + space(host) + "/hosts");
  known << "127.0.0.1 localhost\n";
  for (int other = 0; other < count_; ++other)
    known << address(other) << " " << name(other) << "\n";
  fs::create_directories(join_path(folder_, "tmp-" + name(host)));
}

// Stands for ssh. A host whose cable is out, or the caller's own, is not reached; it is said after
// a while, as by a kernel that asks in vain for the other's address. All are of the same kind to
// BLAS.
void Hosts::write_agent() const {
  const std::string agent = join_path(folder_, "agent.sh");
  std::ofstream script(agent);
  script << "#!/bin/sh\n"
         << "# agent.sh HOST COMMAND...\n"
         << "host=$1\nshift\n"
         << "cd " << folder_ << "\n"
         << "if [ -e cut-\"$host\" ] || [ -e cut-\"$(hostname)\" ]; then\n"
         << "  sleep 3\n"
         << "  echo \"ssh: connect to host $host port 22: No route to host\" >&2\n"
         << "  exit 255\nfi\n"
         << "exec ip netns exec " << prefix_ << "\"$host\" nsenter --uts=" << kNames << prefix_
         << "\"$host\" env -i HOME=/root PATH=\"$PATH\" TMPDIR=" << folder_ << "/tmp-\"$host\""
         << " ${OPENBLAS_CORETYPE:+OPENBLAS_CORETYPE=\"$OPENBLAS_CORETYPE\"} sh -c \"$*\"\n";
  script.close();
  fs::permissions(agent, fs::perms::owner_all);
}

std::string Hosts::on(int host) const {
  std::string words = "exec ip netns exec " + space(host) + " nsenter --uts=" + kNames +
                      space(host) + " env TMPDIR=" + join_path(folder_, "tmp-" + name(host));
  for (const auto& [name, value] :
       {std::pair{"plm_rsh_agent", join_path(folder_, "agent.sh")},
        {"plm_rsh_no_tree_spawn", "1"},
        {"oob_tcp_if_include", "wire"},
        {"btl", "self,vader,tcp"},
        {"btl_tcp_if_include", "wire"},
        {"btl_vader_single_copy_mechanism", "none"},
        {"mpi_yield_when_idle", "1"}})  // they share this machine's cores
    words += concat(" OMPI_MCA_", name, "=", value);
  return words + " OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 ";
}

void Hosts::cut(int host) {
  std::ofstream(join_path(folder_, "cut-" + name(host))).close();
  must("ip -n " + space(-1) + " link set " + name(host) + " down");
}

void Hosts::mend(int host) {
  must("ip -n " + space(-1) + " link set " + name(host) + " up");
  fs::remove(join_path(folder_, "cut-" + name(host)));
}

bool Hosts::is_cut(int host) const {
  return file_exists(join_path(folder_, "cut-" + name(host)));
}

std::vector<pid_t> Hosts::processes(int host, const std::string& program) const {
  std::vector<pid_t> found = processes_of_space(space(host));
  if (!program.empty())
    std::erase_if(found, [&](pid_t id) { return words_of(id, "comm") != program + "\n"; });
  return found;
}

}  // namespace moemamba
