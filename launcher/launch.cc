#include "launcher/launch.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "core/error.h"
#include "core/schema.h"
#include "launcher/stop_signals.h"

namespace moemamba {

namespace {

constexpr const char* kTerminalName = "MOEMAMBA_TERMINAL";  // "COLUMNS color" or "COLUMNS plain"

int first_number(std::initializer_list<const char*> names, int otherwise) {
  for (const char* name : names)
    if (const char* value = std::getenv(name)) return std::atoi(value);
  return otherwise;
}

std::string own_path() {
  char path[4096];
  const ssize_t length = readlink("/proc/self/exe", path, sizeof path - 1);
  check(length > 0,
        "cannot find out which program this is: /proc/self/exe: ", std::strerror(errno));
  return std::string(path, size_t(length));
}

// All that the ranks inherit, and that -x hands to those on other machines.
std::vector<std::string> export_environment() {
  std::vector<std::string> names;
  const auto set = [&](const char* name, const std::string& value) {
    setenv(name, value.c_str(), 1);
    names.emplace_back(name);
  };
  set("OPENBLAS_NUM_THREADS", "1");  // moemamba shares out rows itself, in a fixed order
  set("OMPI_MCA_btl_vader_single_copy_mechanism", "none");  // containers forbid it (ompi#4948)
  if (const Terminal terminal = find_terminal(); terminal.present)
    set(kTerminalName, concat(terminal.columns, terminal.color ? " color" : " plain"));
  if (getuid() == 0) {
    setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 1);
    setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 1);
  }
  return names;
}

bool has_option(const std::vector<std::string>& options, const char* name) {
  return std::find(options.begin(), options.end(), name) != options.end();
}

// In the child: becomes mpirun. A process group of its own, so that a terminal's Ctrl-C reaches
// the ranks once, through the parent; nothing to read from the terminal.
[[noreturn]] void become(const std::vector<std::string>& command, const sigset_t& signals,
                         pid_t parent) {
  std::vector<char*> arguments;
  for (const std::string& word : command) arguments.push_back(const_cast<char*>(word.c_str()));
  arguments.push_back(nullptr);
  setpgid(0, 0);
  prctl(PR_SET_PDEATHSIG, SIGTERM);
  if (getppid() != parent) _exit(1);  // it died before prctl
  sigprocmask(SIG_SETMASK, &signals, nullptr);
  const int null = open("/dev/null", O_RDONLY);
  if (null >= 0) dup2(null, STDIN_FILENO);
  execvp(arguments[0], arguments.data());
  std::fprintf(stderr, "moemamba: mpirun: %s; is Open MPI installed and in PATH?\n",
               std::strerror(errno));
  _exit(127);
}

struct Ended {
  int code = 0;    // of mpirun; 128 + signal if one ended it or one of its ranks
  int signal = 0;  // the latest that this process got
};

// SIGTERM makes mpirun end its ranks: SIGTERM to each, SIGKILL a second later. SIGUSR1 it hands on
// at once and goes on waiting.
Ended wait_for(pid_t child, const sigset_t& signals, OnSignal on_signal) {
  Ended ended;
  for (;;) {
    int status = 0;
    const pid_t found = waitpid(child, &status, WNOHANG);
    check(found >= 0, "waiting for mpirun: ", std::strerror(errno));
    if (found == child && (WIFEXITED(status) || WIFSIGNALED(status))) {
      ended.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
      return ended;
    }
    const int signal = sigwaitinfo(&signals, nullptr);
    if (signal <= 0 || signal == SIGCHLD) continue;
    const bool asks = on_signal == OnSignal::ask && ended.signal == 0;
    kill(child, asks ? SIGUSR1 : SIGTERM);
    ended.signal = signal;
  }
}

// What the ranks' end means, said and as an exit code.
int explain(const Ended& ended, OnSignal on_signal) {
  if (ended.signal != 0) {
    if (ended.code != 0 && ended.code != kExitRestart)
      std::fprintf(stderr, "moemamba: %s: the ranks were ended\n", signal_name(ended.signal));
    if (ended.code == 0 && on_signal == OnSignal::ask) return 0;  // it was at its end anyway
    const bool resumes = ended.code == kExitRestart && ended.signal != SIGINT;
    return resumes ? kExitRestart : 128 + ended.signal;
  }
  if (ended.code <= 128) {
    if (ended.code != 0 && ended.code != kExitSettings)
      std::fprintf(stderr,
                   "moemamba: the ranks ended with exit code %d; which and why, see above\n",
                   ended.code);
    return ended.code;
  }
  std::fprintf(stderr,
               "moemamba: a rank was lost (signal %d: %s); which, see above. Start the same "
               "command again\n",
               ended.code - 128, strsignal(ended.code - 128));
  return kExitRestart;
}

}  // namespace

void add_ranks_option(CLI::App& app, int& ranks) {
  app.add_option("--ranks", ranks,
                 "Processes to start with mpirun, 1 to 4096 (default 1: without it). For\n"
                 "several machines, start mpirun yourself and leave this out")
      ->type_name("N")
      ->check(CLI::Range(1, 4096).description(""));
}

int started_rank() {
  return first_number({"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK"}, -1);
}

int started_local_rank() {
  return first_number({"OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID", "MPI_LOCALRANKID"}, 0);
}

int started_ranks() {
  if (started_rank() < 0) return 1;  // a batch script's own environment has SLURM_* as well
  return first_number({"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"},
                      1);
}

bool must_launch(int ranks) {
  if (started_rank() < 0) return ranks > 1;
  if (ranks > 1 && ranks != started_ranks())
    throw BadSettings(concat("--ranks=", ranks, ": mpirun has already started ", started_ranks(),
                             " ranks; leave --ranks out"));
  return false;
}

std::vector<std::string> mpirun_words(const RanksCommand& command) {
  std::vector<std::string> words{"mpirun", "-n", concat(command.ranks), "--oversubscribe"};
  const auto add = [&](std::initializer_list<std::string> more) {
    words.insert(words.end(), more);
  };
  if (!has_option(command.options, "--bind-to")) add({"--bind-to", "none"});
  if (getuid() == 0) add({"--allow-run-as-root"});
  if (!command.hostfile.empty()) add({"--hostfile", command.hostfile});
  for (const std::string& name : export_environment()) add({"-x", name});
  for (const std::string& name : command.names) add({"-x", name});
  words.insert(words.end(), command.options.begin(), command.options.end());
  words.push_back(own_path());
  words.insert(words.end(), command.words.begin(), command.words.end());
  return words;
}

// srun hands on the whole environment.
std::vector<std::string> srun_words(const RanksCommand& command, const std::string& mpi) {
  export_environment();
  std::vector<std::string> words{"srun", "--mpi=" + mpi, concat("--ntasks=", command.ranks),
                                 "--kill-on-bad-exit=1", "--input=none"};
  if (command.hosts > 0) words.push_back(concat("--nodes=", command.hosts));
  std::string without;
  for (const std::string& host : command.hosts_left_out)
    without += (without.empty() ? "" : ",") + host;
  if (!without.empty()) words.push_back("--exclude=" + without);
  words.insert(words.end(), command.options.begin(), command.options.end());
  words.push_back(own_path());
  words.insert(words.end(), command.words.begin(), command.words.end());
  return words;
}

int launch(int ranks, const std::vector<std::string>& words, OnSignal on_signal) {
  // The words stay as they are, --ranks among them: only the parser knows which of them are values
  // of others, and under mpirun the option only has to agree (must_launch).
  const std::vector<std::string> command = mpirun_words({.ranks = ranks, .words = words});
  sigset_t signals = stop_signals(), before;
  sigaddset(&signals, SIGCHLD);
  sigprocmask(SIG_BLOCK, &signals, &before);
  const pid_t parent = getpid();
  const pid_t child = fork();
  check(child >= 0, "cannot start mpirun: ", std::strerror(errno));
  if (child == 0) become(command, before, parent);
  const Ended ended = wait_for(child, signals, on_signal);
  sigprocmask(SIG_SETMASK, &before, nullptr);
  return explain(ended, on_signal);
}

Terminal find_terminal() {
  Terminal terminal;
  const char* inherited = std::getenv(kTerminalName);
  if (isatty(STDERR_FILENO)) {
    winsize size{};
    ioctl(STDERR_FILENO, TIOCGWINSZ, &size);
    const char* kind = std::getenv("TERM");
    const bool dumb = !kind || std::strcmp(kind, "dumb") == 0;
    terminal.present = !dumb;
    terminal.color = !dumb && !std::getenv("NO_COLOR");
    terminal.columns = size.ws_col;
  } else if (inherited && started_rank() >= 0) {
    terminal.present = true;
    terminal.color = std::strstr(inherited, "color") != nullptr;
    terminal.columns = std::atoi(inherited);
  }
  return terminal;
}

}  // namespace moemamba
