// A settings file, and each of its lines as an option of the command line.
#include "core/schema.h"
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

void read(std::string_view text) {
  RunConfig config;
  Settings settings(config);
  settings.read_text("file", text);
  if (settings.problems().empty()) expect_same_again(config);
  model_problems(config.model());
}

void read_options(std::string_view text) {
  RunConfig config;
  Settings settings(config);
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    settings.read_option(std::string(text.substr(at, end - at)));
    at = end + 1;
  }
  if (settings.problems().empty()) expect_same_again(config);
  model_problems(config.model());
}

}  // namespace
}  // namespace moemamba

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace moemamba;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    read(text);
    read_options(text);
  } catch (const Error&) {
  }
  return 0;
}
