#include "launcher/supervisor/command_output.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

namespace moemamba {

using Clock = std::chrono::steady_clock;

std::string output_of(const std::vector<std::string>& command, Clock::time_point end,
                      bool errors_too) {
  std::vector<char*> words;
  for (const std::string& word : command) words.push_back(const_cast<char*>(word.c_str()));
  words.push_back(nullptr);
  int pipe_ends[2];
  if (pipe2(pipe_ends, O_CLOEXEC) != 0) return "";
  const pid_t child = fork();
  if (child == 0) {
    const int null = open("/dev/null", O_RDWR);
    dup2(null, STDIN_FILENO);
    dup2(pipe_ends[1], STDOUT_FILENO);
    dup2(errors_too ? pipe_ends[1] : null, STDERR_FILENO);
    closefrom(3);
    execvp(words[0], words.data());
    _exit(127);
  }
  close(pipe_ends[1]);
  std::string text;
  for (;;) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end - Clock::now());
    pollfd wanted{.fd = pipe_ends[0], .events = POLLIN, .revents = 0};
    char bytes[4096];
    if (child < 0 || left.count() <= 0 || poll(&wanted, 1, int(left.count())) != 1) break;
    const ssize_t got = read(pipe_ends[0], bytes, sizeof bytes);
    if (got <= 0) break;
    text.append(bytes, size_t(got));
  }
  close(pipe_ends[0]);
  if (child > 0) {
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
  }
  return text;
}

}  // namespace moemamba
