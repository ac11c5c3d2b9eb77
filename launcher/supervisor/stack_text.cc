#include "launcher/supervisor/stack_text.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <sstream>

#include "core/error.h"
#include "core/file.h"

namespace moemamba {

namespace {

using Clock = std::chrono::steady_clock;

// What a command prints until `end`; then it is killed.
std::string output_of(const std::vector<std::string>& command, Clock::time_point end) {
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
    dup2(null, STDERR_FILENO);
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

struct Frame {
  std::string file, offset;  // empty: a name alone
};

Frame frame_of(const std::string& text) {
  const size_t plus = text.rfind("+0x");
  if (plus == std::string::npos || plus == 0 || text[0] != '/') return {};
  const std::string offset = text.substr(plus + 1);
  const bool hex = offset.find_first_not_of("0123456789abcdef", 2) == std::string::npos;
  if (!hex || offset.size() < 3 || !file_exists(text.substr(0, plus))) return {};
  return {text.substr(0, plus), offset};
}

}  // namespace

std::string stack_text(const std::vector<std::string>& frames, double most_seconds) {
  const auto end = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                      std::chrono::duration<double>(most_seconds));
  std::vector<std::string> lines = frames;
  std::map<std::string, std::vector<size_t>> of_files;
  for (size_t i = 0; i < frames.size(); ++i)
    if (const Frame frame = frame_of(frames[i]); !frame.file.empty())
      of_files[frame.file].push_back(i);
  for (const auto& [file, at] : of_files) {
    std::vector<std::string> command{"addr2line", "-Cfe", file};
    for (size_t i : at) command.push_back(frame_of(frames[i]).offset);
    std::istringstream names(output_of(command, end));  // two lines for each: function, place
    std::string function, place;
    for (size_t i : at) {
      if (!std::getline(names, function) || !std::getline(names, place)) break;
      if (function != "??") lines[i] = function;
      if (place.rfind("??", 0) != 0) lines[i] += " (" + place + ")";
    }
  }
  std::string text;
  for (const std::string& line : lines) text += "    " + line + "\n";
  return text;
}

}  // namespace moemamba
