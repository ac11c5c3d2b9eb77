// A settings file, and each of its lines as an option of the command line.
#include "core/schema.h"

#include <optional>
#include <vector>

#include "launcher/run_config.pb.h"
#include "model/config.h"
#include "tests/fuzz/fuzz.h"

namespace moemamba {
namespace {

// What was taken without a problem reads back as the same.
void expect_same_again(const RunConfig& config) {
  const std::string text = resolved_text(config);
  RunConfig again;
  Settings settings(again);
  settings.read_text("resolved", text);
  require(settings.problems().empty(), "resolved settings are good settings");
  require(resolved_text(again) == text, "resolved settings resolve to themselves");
}

// Beyond twice the text: a hundred problems, one note of its place for each setting there is, and
// the elements of lists, of which there are Settings::kMostElements at most: an element may be
// three bytes of the text, "", and is 32 of std::string behind up to three of protobuf's pointers.
constexpr int64_t kMore = 80 << 10;  // reached: 74

void check_settings(const Settings& settings, const RunConfig& config) {
  if (settings.problems().empty()) expect_same_again(config);
  model_problems(config.model());
}

void read(const FuzzFolder& folder, std::string_view text) {
  folder.put("file", text);
  std::optional<AllocationLimit> limit(std::in_place, text.size(), 2, kMore);
  RunConfig config;
  Settings settings(config);
  settings.read_file(folder / "file");
  limit.reset();
  check_settings(settings, config);
}

void read_options(std::string_view text) {
  std::vector<std::string> options;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    options.emplace_back(text.substr(at, end - at));
    at = end + 1;
  }
  std::optional<AllocationLimit> limit(std::in_place, text.size(), 2, kMore);
  RunConfig config;
  Settings settings(config);
  for (const std::string& option : options) settings.read_option(option);
  limit.reset();
  check_settings(settings, config);
}

// Texts that ask for as much as they can: the inputs of libFuzzer are short, and of those the
// bound's constant part is the larger one.
bool read_greedy(const FuzzFolder& folder) {
  const std::string long_one(100000, 'x');
  std::string lists = "data { train: [\"\"", enums = "model { projections: [CONV", strange, option;
  for (int i = 0; i < 30000; ++i) lists += ",\"\"", enums += ",CONV", strange += "a ";
  for (int i = 0; i < 8000; ++i) option += "--data.train=\n";
  // Every setting there is, lists that are full, and more problems than are kept.
  std::string all = resolved_text(RunConfig()), elements = "data {\n  train: [\"\"", wrong;
  for (int i = 1; i < Settings::kMostElements; ++i) elements += ",\"\"";
  for (int i = 0; i < 200; ++i) wrong += "z:1 ";
  for (const auto& [at, more] :
       {std::pair("data {", elements + "]"), std::pair("train {", "train {\n" + wrong)}) {
    const size_t found = all.find(at);
    require(found != std::string::npos, "resolved settings have the groups data and train");
    all.replace(found, std::string(at).size(), more);
  }
  for (const std::string& text :
       {lists + "] }", enums + "] }", strange, "run: \"" + long_one + "\"",
        "data { train: [\"" + long_one + "\", \"" + long_one + "\"] }", long_one, long_one + ": 1",
        "run: " + long_one, "model { width: " + long_one + " }", "run: \"" + long_one,
        "--run=" + long_one, option, std::string(1 << 18, '{'), std::string(1 << 18, '\n') + "x",
        all}) {
    read(folder, text);
    read_options(text);
  }
  return true;
}

}  // namespace
}  // namespace moemamba

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace moemamba;
  // protobuf makes its descriptors, and what they say of ranges, once in a process.
  static const std::string made = resolved_text(RunConfig());
  static const FuzzFolder folder;
  static const bool greedy = read_greedy(folder);
  require(greedy && !made.empty(), "greedy settings were read");
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    read(folder, text);
    read_options(text);
  } catch (const Error&) {
  }
  return 0;
}
