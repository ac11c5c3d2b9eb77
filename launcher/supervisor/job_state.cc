#include "launcher/supervisor/job_state.h"

#include "core/error.h"
#include "runtime/json_reader.h"
#include "runtime/json_text.h"

namespace moemamba {

namespace {

constexpr int64_t kVersion = 1;

std::string path_in(const std::string& folder) {
  return join_path(folder, "state.json");
}

}  // namespace

void write_job_state(FileSystem& files, const std::string& folder, const JobState& state) {
  std::string command;
  for (const std::string& word : state.command)
    command += (command.empty() ? "" : ",") + json_text(word);
  const auto field = [](const char* name, const auto& value) {
    return concat(",\"", name, "\":", value);
  };
  write_file(
      files, path_in(folder),
      concat("{\"version\":", kVersion, field("running", int(state.running)),
             field("resumes", int(state.resumes)), field("job", json_text(state.job)),
             field("attempt", state.attempt), field("host", json_text(state.host)),
             field("boot_id", json_text(state.boot_id)), field("pid", state.pid),
             field("started", state.started), field("ranks", state.ranks),
             field("expert", state.expert), field("steps_lost", state.steps_lost),
             field("step_limit_ms", state.step_limit_ms), field("command", "[" + command + "]"),
             field("memory", memory_json(state.memory)), "}\n"));
}

std::optional<JobState> read_job_state(const std::string& folder) {
  const std::string path = path_in(folder);
  if (!file_exists(path)) return std::nullopt;
  JobState state;
  int64_t version = 0;
  try {
    const std::string text = read_file(path);
    JsonReader json(text, path);
    const auto string = [&] { return unescaped(json.string()); };
    json.object([&](std::string_view key) {
      if (key == "version")
        version = json.integer();
      else if (key == "running")
        state.running = json.integer() != 0;
      else if (key == "resumes")
        state.resumes = json.integer() != 0;
      else if (key == "job")
        state.job = string();
      else if (key == "attempt")
        state.attempt = json.integer();
      else if (key == "host")
        state.host = string();
      else if (key == "boot_id")
        state.boot_id = string();
      else if (key == "pid")
        state.pid = json.integer();
      else if (key == "started")
        state.started = json.integer();
      else if (key == "ranks")
        state.ranks = int(json.integer());
      else if (key == "expert")
        state.expert = int(json.integer());
      else if (key == "steps_lost")
        state.steps_lost = json.integer();
      else if (key == "step_limit_ms")
        state.step_limit_ms = json.integer();
      else if (key == "command")
        json.list([&] { state.command.push_back(string()); });
      else if (key == "memory")
        read_memory(json, state.memory);
      else
        json.skip();
    });
  } catch (const Error&) {
    return std::nullopt;
  }
  if (version != kVersion) return std::nullopt;
  return state;
}

}  // namespace moemamba
