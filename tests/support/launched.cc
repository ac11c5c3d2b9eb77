#include "tests/support/launched.h"

#include <signal.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>
#include <thread>

#include "core/error.h"
#include "core/file.h"
#include "runtime/checkpoint_folder.h"
#include "runtime/process_facts.h"

namespace moemamba {

namespace {

std::string content(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();  // of one that is not there: nothing
  return text.str();
}

int64_t number_after(const std::string& text, const std::string& name, int64_t otherwise) {
  const size_t at = text.find(name);
  return at == std::string::npos ? otherwise : std::atoll(text.c_str() + at + name.size());
}

double decimal_after(const std::string& text, const std::string& name) {
  const size_t at = text.find(name);
  return at == std::string::npos ? 0 : std::strtod(text.c_str() + at + name.size(), nullptr);
}

// Of a line's field "name":"..."; escapes stay as they are.
std::string text_after(const std::string& line, const std::string& name) {
  const std::string begin = "\"" + name + "\":\"";
  size_t at = line.find(begin);
  if (at == std::string::npos) return "";
  at += begin.size();
  size_t end = at;
  while (end < line.size() && line[end] != '"') end += line[end] == '\\' ? 2 : 1;
  return line.substr(at, end - at);
}

ino_t inode(const std::string& path) {
  struct stat facts {};
  return stat(path.c_str(), &facts) == 0 ? facts.st_ino : 0;
}

// Tells of a fault; what follows from one does not.
bool tells(const std::string& kind) {
  static const std::set<std::string> kinds{"lost", "hang", "failed", "taken_over"};
  return kinds.contains(kind);
}

}  // namespace

void pause_for(double seconds) {
  std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
}

Launched::Launched(std::string folder, std::string run, std::string words, const Hosts* hosts,
                   std::string said)
    : folder_(std::move(folder)),
      run_(std::move(run)),
      words_(std::move(words)),
      said_(join_path(folder_, said)),
      hosts_(hosts) {}

Launched::~Launched() {
  if (supervisor_ > 0) kill_supervisor();
  if (forgets_) return;
  wait_until(
      [&] {
        const std::vector<pid_t> left = processes_left();
        for (pid_t id : left) kill(id, SIGKILL);
        return left.empty();
      },
      20);
}

std::string Launched::file(const std::string& name) const {
  return join_path(run_, name);
}

void Launched::start() {
  check(supervisor_ == 0, "the supervisor runs already, or nobody has waited for its end");
  const std::string command = (hosts_ ? hosts_->on(0)
                                      : std::string("exec env OMPI_ALLOW_RUN_AS_ROOT=1 "
                                                    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 ")) +
                              MOEMAMBA_BINARY_DIR "/moemamba launch " + words_ + " >>" + said_ +
                              " 2>&1 </dev/null";
  const pid_t parent = getpid();
  const pid_t child = fork();
  check(child >= 0, "cannot fork");
  if (child == 0) {
    setpgid(0, 0);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent || chdir(folder_.c_str()) != 0) _exit(99);
    execl("/bin/sh", "sh", "-c", command.c_str(), nullptr);
    _exit(99);
  }
  supervisor_ = child;
}

bool Launched::has_ended() const {
  siginfo_t info{};
  return supervisor_ == 0 ||
         waitid(P_PID, id_t(supervisor_), &info, WEXITED | WNOHANG | WNOWAIT) != 0 ||
         info.si_pid == supervisor_;
}

int Launched::end(double seconds) {
  if (!wait_until([&] { return has_ended(); }, seconds)) {
    kill_supervisor();
    return kNoEnd;
  }
  int status = 0;
  waitpid(supervisor_, &status, 0);
  supervisor_ = 0;
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

void Launched::kill_supervisor() {
  kill(supervisor_, SIGKILL);
  waitpid(supervisor_, nullptr, 0);
  supervisor_ = 0;
}

std::string Launched::said() const {
  return content(said_);
}

int64_t Launched::steps() const {
  std::ifstream metrics(file("metrics.jsonl"), std::ios::binary);
  constexpr int64_t kTail = 4096;  // several lines
  metrics.seekg(0, std::ios::end);
  const auto size = int64_t(metrics.tellg());
  if (size <= 0) return 0;
  metrics.seekg(std::max<int64_t>(0, size - kTail));
  std::ostringstream text;
  text << metrics.rdbuf();
  const std::string tail = text.str();
  const size_t end = tail.rfind('\n');
  if (end == std::string::npos) return 0;
  const size_t begin = end == 0 ? std::string::npos : tail.rfind('\n', end - 1);
  const std::string line = tail.substr(begin == std::string::npos ? 0 : begin + 1);
  return number_after(line, "{\"step\":", -1) + 1;
}

int64_t Launched::attempt() const {
  return number_after(content(file("supervisor/state.json")), "\"attempt\":", 0);
}

std::vector<LoggedEvent> Launched::events(const std::string& kind) const {
  std::vector<LoggedEvent> events;
  std::istringstream lines(content(file("events.jsonl")));
  for (std::string line; std::getline(lines, line);) {
    LoggedEvent event{.kind = text_after(line, "kind"),
                      .job = text_after(line, "job"),
                      .text = text_after(line, "text"),
                      .step = number_after(line, "\"step\":", -1),
                      .wall = decimal_after(line, "\"time\":")};
    if (kind.empty() || event.kind == kind) events.push_back(std::move(event));
  }
  return events;
}

bool Launched::is_saved() const {
  return !list_checkpoints(run_).empty();
}

Processes Launched::processes() const {
  return find_processes("--run=" + run_);
}

std::vector<pid_t> Launched::processes_left() const {
  std::set<pid_t> found;
  for (pid_t id : processes_with("--run=" + run_)) found.insert(id);
  for (int host = 0; hosts_ && host < hosts_->count(); ++host)
    for (pid_t id : hosts_->processes(host)) found.insert(id);
  std::vector<pid_t> left;
  for (pid_t id : found)
    if (id != supervisor_ && process_start(id) != 0) left.push_back(id);
  return left;
}

bool Launched::wait_for_steps(int64_t more, double seconds) const {
  const int64_t wanted = steps() + more;
  return wait_until([&] { return steps() >= wanted; }, seconds);
}

Launched::Before Launched::before() const {
  Before before{
      .time = {}, .wall = 0, .attempt = attempt(), .steps = steps(), .events = events().size()};
  before.time = Clock::now();
  const auto wall = std::chrono::system_clock::now().time_since_epoch();
  before.wall = std::chrono::duration<double>(wall).count();
  return before;
}

// metrics.jsonl still has the steps of the attempt before until the new one cuts them off, by
// another file of that name; its event "resumed" says from which step on it takes them again.
Outcome Launched::go_on_after(const Before& before, double seconds) const {
  Outcome outcome;
  const auto since = [&] {
    return std::chrono::duration<double>(Clock::now() - before.time).count();
  };
  const std::string metrics = file("metrics.jsonl"), log = file("events.jsonl");
  int64_t of = before.attempt, done = before.steps, from = -1, taken_over_at = -1;
  size_t log_size = 0;
  ino_t old_metrics = inode(metrics);
  for (; since() < seconds && !has_ended(); pause_for(0.003)) {
    std::error_code none;
    const size_t size = std::filesystem::file_size(log, none);
    if (const int64_t now = attempt(); now > of) {
      of = now;
      from = -1;
      old_metrics = inode(metrics);
      if (steps() > done) done = steps();
      log_size = 0;  // to be read again
    }
    if (size != log_size) {
      log_size = size;
      const std::vector<LoggedEvent> all = events();
      for (size_t i = before.events; i < all.size(); ++i) {
        if (outcome.found < 0 && tells(all[i].kind)) {
          outcome.found = since();
          outcome.event = all[i];
        }
        if (all[i].kind == "resumed" && all[i].job == all.back().job && of > before.attempt)
          from = all[i].step;
        if (all[i].kind == "taken_over" && taken_over_at < 0) taken_over_at = steps();
      }
    }
    const bool cut = inode(metrics) != old_metrics || done == from;
    if (of == before.attempt) {
      done = std::max(done, steps());
      if (taken_over_at < 0 || done <= taken_over_at) continue;
      outcome.next_step = since();  // its ranks never stopped
      return outcome;
    }
    if (from >= 0 && cut && steps() > from) {
      outcome.next_step = since();
      outcome.lost = done - from;
      return outcome;
    }
  }
  return outcome;
}

}  // namespace moemamba
