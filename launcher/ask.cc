#include "launcher/ask.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <sstream>
#include <string_view>
#include <thread>

namespace moemamba {

namespace {

using Clock = std::chrono::steady_clock;
constexpr size_t kMostBytes = 1 << 20;

// True for what mpirun and srun set for the ranks that they start, false for what people set.
bool belongs_to_a_rank(std::string_view variable) {
  if (variable.starts_with("PMIX_MCA_")) return false;
  if (variable.starts_with("PMIX_") || variable.starts_with("PMI_")) return true;
  if (variable.starts_with("SLURM_"))
    return std::getenv("SLURM_STEP_ID") && !variable.starts_with("SLURM_CONF=");
  if (!variable.starts_with("OMPI_") || !std::getenv("OMPI_COMM_WORLD_RANK")) return false;
  for (const char* peoples : {"OMPI_ALLOW_", "OMPI_MCA_btl_", "OMPI_MCA_oob_", "OMPI_MCA_plm_"})
    if (variable.starts_with(peoples)) return false;
  return true;
}

std::vector<std::string> environment_with(
    const std::vector<std::pair<std::string, std::string>>& more) {
  std::vector<std::string> lines;
  for (char** at = environ; *at; ++at) {
    const std::string_view line = *at;
    const std::string_view name = line.substr(0, line.find('='));
    const bool replaced = std::ranges::any_of(more, [&](const auto& m) { return m.first == name; });
    if (!replaced && !belongs_to_a_rank(line)) lines.emplace_back(line);
  }
  for (const auto& [name, value] : more) lines.push_back(name + "=" + value);
  return lines;
}

std::vector<char*> pointers_to(const std::vector<std::string>& texts) {
  std::vector<char*> pointers;
  for (const std::string& text : texts) pointers.push_back(const_cast<char*>(text.c_str()));
  pointers.push_back(nullptr);
  return pointers;
}

class Pipe {
 public:
  Pipe() {
    if (pipe2(ends_.data(), O_CLOEXEC) != 0) ends_ = {-1, -1};
  }
  Pipe(const Pipe&) = delete;
  Pipe& operator=(const Pipe&) = delete;
  ~Pipe() {
    close_end(0);
    close_end(1);
  }
  int from() const { return ends_[0]; }
  int to() const { return ends_[1]; }
  void close_end(int end) {
    if (ends_[size_t(end)] >= 0) close(ends_[size_t(end)]);
    ends_[size_t(end)] = -1;
  }

 private:
  std::array<int, 2> ends_{-1, -1};
};

// 0 and the process, or why it cannot be started.
int start(const std::vector<std::string>& words, const std::vector<std::string>& environment,
          const Pipe& out, const Pipe& err, pid_t& child) {
  posix_spawn_file_actions_t files;
  posix_spawnattr_t attributes;
  posix_spawn_file_actions_init(&files);
  posix_spawnattr_init(&attributes);
  posix_spawn_file_actions_addopen(&files, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&files, out.to(), STDOUT_FILENO);
  posix_spawn_file_actions_adddup2(&files, err.to(), STDERR_FILENO);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP);
  posix_spawnattr_setpgroup(&attributes, 0);
  const int refused = posix_spawnp(&child, words[0].c_str(), &files, &attributes,
                                   pointers_to(words).data(), pointers_to(environment).data());
  posix_spawnattr_destroy(&attributes);
  posix_spawn_file_actions_destroy(&files);
  return refused;
}

int milliseconds_until(Clock::time_point end) {
  const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end - Clock::now());
  return int(std::max<int64_t>(0, left.count()));
}

// Until both pipes are closed by all who write into them; false: the time was up before.
bool listen(Pipe& out, Pipe& err, Clock::time_point end, Answer& answer) {
  Pipe* pipes[] = {&out, &err};
  std::string* texts[] = {&answer.out, &answer.err};
  for (Pipe* pipe : pipes) pipe->close_end(1);
  while (out.from() >= 0 || err.from() >= 0) {
    pollfd waits[] = {{out.from(), POLLIN, 0}, {err.from(), POLLIN, 0}};
    const int ready = poll(waits, 2, milliseconds_until(end));
    if (ready < 0 && errno == EINTR) continue;
    if (ready <= 0) return false;
    for (int i = 0; i < 2; ++i) {
      if (waits[i].revents == 0) continue;
      std::array<char, 1 << 14> buffer;
      const ssize_t got = read(pipes[i]->from(), buffer.data(), buffer.size());
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) pipes[i]->close_end(0);
      if (got > 0 && texts[i]->size() < kMostBytes) texts[i]->append(buffer.data(), size_t(got));
    }
  }
  return true;
}

// False: it has not ended by then.
bool wait_until(pid_t child, Clock::time_point end, int& status) {
  for (;;) {
    const pid_t found = waitpid(child, &status, WNOHANG);
    if (found == child || (found < 0 && errno == ECHILD)) return true;
    if (Clock::now() >= end) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

// mpirun ends its ranks only where it is asked to end.
void end_group(pid_t child) {
  int status = 0;
  for (const auto& [signal, seconds] : {std::pair(SIGTERM, 2), std::pair(SIGKILL, 1)}) {
    kill(-child, signal);
    if (wait_until(child, Clock::now() + std::chrono::seconds(seconds), status)) return;
  }
}

}  // namespace

std::string Answer::gist() const {
  constexpr size_t kMost = 240;
  std::string sentence, first;
  std::istringstream lines(err + "\n" + out);
  for (std::string line; std::getline(lines, line);) {
    const size_t begin = line.find_first_not_of(" \t\r");
    const bool said = begin != std::string::npos && line.compare(begin, 3, "---") != 0;
    const bool framed = said && (line[begin] == '[' || line[begin] == '*');
    if (said && first.empty()) first = line.substr(begin);
    if (said && !framed) sentence += (sentence.empty() ? "" : " ") + line.substr(begin);
    if (!sentence.empty() && (!said || framed || sentence.size() > kMost)) break;
  }
  if (sentence.empty()) sentence = first;
  return sentence.empty() ? "it said nothing" : sentence.substr(0, kMost);
}

Answer ask(const std::vector<std::string>& words, double seconds,
           const std::vector<std::pair<std::string, std::string>>& environment) {
  Answer answer;
  answer.missing = find_program(words[0]).empty();
  if (answer.missing) return answer;
  const auto end = Clock::now() + std::chrono::milliseconds(int64_t(seconds * 1e3));
  Pipe out, err;
  pid_t child = -1;
  if (out.to() < 0 || err.to() < 0 ||
      start(words, environment_with(environment), out, err, child) != 0)
    return answer;
  int status = 0;
  const bool ended = listen(out, err, end, answer) && wait_until(child, end, status);
  answer.late = !ended;
  if (ended)
    answer.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  else
    end_group(child);
  return answer;
}

SessionFolder::SessionFolder() {
  const char* set = std::getenv("TMPDIR");
  path_ = set && *set ? set : "/tmp";
  std::string own = path_ + "/moemamba-mpi-XXXXXX";
  own_ = mkdtemp(own.data()) != nullptr;
  if (own_) path_ = own;
}

SessionFolder::~SessionFolder() {
  std::error_code ignored;
  if (own_) std::filesystem::remove_all(path_, ignored);
}

std::string find_program(const std::string& name) {
  if (name.find('/') != std::string::npos) return access(name.c_str(), X_OK) == 0 ? name : "";
  const char* path = std::getenv("PATH");
  std::istringstream folders(path ? path : "/usr/bin:/bin");
  for (std::string folder; std::getline(folders, folder, ':');) {
    const std::string candidate = (folder.empty() ? "." : folder) + "/" + name;
    if (access(candidate.c_str(), X_OK) == 0) return candidate;
  }
  return "";
}

std::string own_program() {
  char path[4096];
  const ssize_t length = readlink("/proc/self/exe", path, sizeof path);
  return length > 0 ? std::string(path, size_t(length)) : "moemamba";
}

}  // namespace moemamba
