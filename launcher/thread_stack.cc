#include "launcher/thread_stack.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <execinfo.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <ios>

#include "core/error.h"

namespace moemamba {

namespace {

constexpr int kMost = 64;

// Nothing of ours or of the libraries that we know uses it; StopSignals has others.
int stack_signal() {
  return SIGRTMIN + 6;
}

std::string readable(const char* name) {
  int status = 0;
  char* plain = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  std::string text = status == 0 && plain ? plain : name;
  std::free(plain);
  return text;
}

// A return address belongs to the call before it.
std::string frame_text(void* address, bool returns) {
  const auto at = reinterpret_cast<uintptr_t>(address) - (returns ? 1 : 0);
  Dl_info facts{};
  if (dladdr(reinterpret_cast<void*>(at), &facts) == 0 || !facts.dli_fname) return "?";
  if (facts.dli_sname) return readable(facts.dli_sname);
  std::error_code ignored;  // a program is named as it was started, which may say little
  const std::string file = facts.dli_fname[0] == '/'
                               ? facts.dli_fname
                               : std::filesystem::read_symlink("/proc/self/exe", ignored).string();
  return concat(file, "+0x", std::hex, at - reinterpret_cast<uintptr_t>(facts.dli_fbase));
}

std::string file_text(const std::string& path) {
  std::ifstream file(path);
  std::string text;
  std::getline(file, text);
  return text;
}

}  // namespace

struct ThreadStack::Shared {
  pthread_t thread = pthread_self();
  pid_t id = gettid();
  std::atomic<uint64_t> asked{0}, answered{0};
  std::array<void*, kMost> frames{};
  int count = 0;

  // The question comes with the signal, so that nothing global is needed.
  static void on_signal(int, siginfo_t* facts, void*) {
    const int error = errno;
    if (facts->si_code == SI_QUEUE && facts->si_pid == getpid()) {
      auto* shared = static_cast<Shared*>(facts->si_value.sival_ptr);
      shared->count = backtrace(shared->frames.data(), kMost);
      shared->answered.store(shared->asked.load());
    }
    errno = error;
  }
};

ThreadStack::ThreadStack() : shared_(std::make_unique<Shared>()) {
  // Once before, for the first call loads a library, which no signal handler may.
  shared_->count = backtrace(shared_->frames.data(), kMost);
  struct sigaction action {};
  action.sa_sigaction = Shared::on_signal;
  action.sa_flags = SA_SIGINFO | SA_RESTART;
  check(sigaction(stack_signal(), &action, nullptr) == 0, "sigaction: ", std::strerror(errno));
}

ThreadStack::~ThreadStack() = default;

void ThreadStack::ask() {
  ++shared_->asked;
  sigval value{};
  value.sival_ptr = shared_.get();
  pthread_sigqueue(shared_->thread, stack_signal(), value);
}

std::optional<std::vector<std::string>> ThreadStack::answer() const {
  if (shared_->asked == 0 || shared_->answered != shared_->asked) return std::nullopt;
  std::vector<std::string> frames;
  // The handler, the kernel's return from it, and then the frame that was interrupted.
  for (int i = 2; i < shared_->count; ++i)
    frames.push_back(frame_text(shared_->frames[size_t(i)], i > 2));
  return frames;
}

std::string ThreadStack::kernel_state() const {
  const std::string folder = concat("/proc/self/task/", shared_->id);
  std::string state = "unknown";
  std::ifstream status(folder + "/status");
  for (std::string line; std::getline(status, line);)
    if (line.rfind("State:", 0) == 0) state = line.substr(line.find_first_not_of(" \t", 6));
  const std::string wchan = file_text(folder + "/wchan");
  return wchan.empty() || wchan == "0" ? state : concat(state, " in ", wchan);
}

}  // namespace moemamba
