#include "launcher/process_sweep.h"

#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <thread>

#include "core/error.h"
#include "runtime/process_facts.h"

namespace moemamba {

namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

std::vector<int64_t> numbers_in(const std::string& folder) {
  std::vector<int64_t> numbers;
  std::error_code error;
  for (fs::directory_iterator at(folder, error), end; !error && at != end; at.increment(error)) {
    const std::string name = at->path().filename().string();
    int64_t number = 0;
    const auto [rest, wrong] = std::from_chars(name.data(), name.data() + name.size(), number);
    if (wrong == std::errc() && rest == name.data() + name.size()) numbers.push_back(number);
  }
  return numbers;
}

std::string content(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};  // of one that ends meanwhile: nothing
}

// Whether `entry` is one of the texts that zeros end.
bool has_entry(const std::string& environment, const std::string& entry) {
  const std::string whole = entry + '\0';
  for (size_t at = environment.find(whole); at != std::string::npos;
       at = environment.find(whole, at + 1))
    if (at == 0 || environment[at - 1] == '\0') return true;
  return false;
}

// Of the same name of the host: a container with one of its own is another machine, whose ranks the
// launch there looks after.
bool is_of_this_host(int64_t pid) {
  const auto name_space = [](const std::string& process) {
    std::error_code error;
    return fs::read_symlink("/proc/" + process + "/ns/uts", error).string();
  };
  return name_space(concat(pid)) == name_space("self");
}

bool bears(int64_t pid, const ProcessMark& mark) {
  const std::string environment = content(concat("/proc/", pid, "/environ"));
  const auto in = [&](const std::string& entry) { return has_entry(environment, entry); };
  return std::ranges::all_of(mark.has, in) && std::ranges::none_of(mark.lacks, in);
}

// A process on its way out has no environment any more, but may still hold memory and a GPU; one
// whose first thread has ended looks like a zombie while the others run on.
bool lives(const FoundProcess& process) {
  const std::string folder = concat("/proc/", process.pid);
  const int64_t started = process_start(process.pid);
  if (started != 0) return started == process.started;
  for (int64_t thread : numbers_in(folder + "/task")) {
    const std::string stat = content(concat(folder, "/task/", thread, "/stat"));
    const size_t name_end = stat.rfind(')');
    if (name_end == std::string::npos || stat.size() < name_end + 3) continue;
    if (stat[name_end + 2] != 'Z' && stat[name_end + 2] != 'X') return true;
  }
  return false;
}

// Held by a descriptor, so that the number cannot come to mean another process in between.
void kill_marked(const FoundProcess& process, const ProcessMark& mark) {
  const auto held = int(syscall(SYS_pidfd_open, process.pid, 0));
  const bool too_old = held < 0 && errno == ENOSYS;  // the kernel, before 5.3
  if ((held >= 0 || too_old) && process_start(process.pid) == process.started &&
      bears(process.pid, mark))
    too_old ? kill(process.pid, SIGKILL)
            : int(syscall(SYS_pidfd_send_signal, held, SIGKILL, nullptr, 0));
  if (held >= 0) ::close(held);
}

}  // namespace

std::vector<FoundProcess> marked_processes(const ProcessMark& mark) {
  std::vector<FoundProcess> found;
  for (int64_t pid : numbers_in("/proc")) {
    if (pid == getpid() || !bears(pid, mark) || !is_of_this_host(pid)) continue;
    FoundProcess process{.pid = pid_t(pid), .started = process_start(pid), .program = ""};
    process.program = content(concat("/proc/", pid, "/comm"));
    if (!process.program.empty()) process.program.pop_back();
    if (process.started != 0) found.push_back(std::move(process));
  }
  return found;
}

Swept sweep_processes(const ProcessMark& mark, std::chrono::milliseconds time) {
  check(!mark.has.empty(), "a sweep needs a mark: without one every process would be killed");
  Swept swept;
  const auto end = Clock::now() + time;
  for (;;) {
    const std::vector<FoundProcess> marked = marked_processes(mark);
    for (const FoundProcess& process : marked) {
      kill_marked(process, mark);
      const bool known = std::ranges::any_of(swept.killed, [&](const FoundProcess& other) {
        return other.pid == process.pid && other.started == process.started;
      });
      if (!known) swept.killed.push_back(process);
    }
    swept.left.clear();
    std::ranges::copy_if(swept.killed, std::back_inserter(swept.left), lives);
    if ((swept.left.empty() && marked.empty()) || Clock::now() >= end) return swept;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

std::string describe(const std::vector<FoundProcess>& processes) {
  std::string text;
  for (const FoundProcess& process : processes)
    text += concat(text.empty() ? "" : ", ", process.program, " (pid ", process.pid, ")");
  return text;
}

}  // namespace moemamba
