#include "launcher/supervisor/stack_text.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <sstream>

#include "core/error.h"
#include "core/file.h"
#include "launcher/supervisor/command_output.h"

namespace moemamba {

namespace {

using Clock = std::chrono::steady_clock;

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
