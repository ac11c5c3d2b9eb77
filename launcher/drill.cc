#include "launcher/drill.h"

#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <fstream>
#include <map>
#include <sstream>
#include <thread>

#include "core/error.h"
#include "core/file.h"
#include "core/schema.h"

namespace moemamba {

namespace {

struct KindFacts {
  Drill::Kind kind;
  const char* name;
  std::vector<std::string> needs;  // keys
  bool counts;                     // `times` may be given
};

const std::vector<KindFacts>& kinds() {
  static const std::vector<KindFacts> all = {
      {Drill::Kind::crash, "crash", {"rank", "step"}, true},
      {Drill::Kind::hang, "hang", {"rank", "step"}, true},
      {Drill::Kind::stop, "stop", {"rank", "step"}, true},
      {Drill::Kind::nan, "nan", {"rank", "step"}, true},
      {Drill::Kind::slow, "slow", {"rank", "factor", "from"}, false}};
  return all;
}

[[noreturn]] void refuse(const std::string& text, const std::string& why) {
  std::string accepted;
  for (const KindFacts& facts : kinds()) {
    accepted += concat("\n  ", facts.name);
    for (const std::string& key : facts.needs) accepted += " " + key + "=N";
    if (facts.counts) accepted += " [times=N|always]";
  }
  throw BadSettings(concat("--drill \"", text, "\": ", why, "; expected one of", accepted));
}

template <class Number>
Number number(const std::string& text, const std::string& key, const std::string& value,
              Number least) {
  Number found{};
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), found);
  if (error != std::errc() || end != value.data() + value.size() || !(found >= least))
    refuse(text, concat(key, "=", value, " is no number from ", least, " on"));
  return found;
}

// "rank=1 step=20" as a map. Every key once.
std::map<std::string, std::string> values_of(const std::string& text, std::istringstream& words) {
  std::map<std::string, std::string> values;
  for (std::string word; words >> word;) {
    const size_t equals = word.find('=');
    if (equals == std::string::npos) refuse(text, concat("\"", word, "\" is no key=value"));
    if (!values.emplace(word.substr(0, equals), word.substr(equals + 1)).second)
      refuse(text, concat(word.substr(0, equals), " is given twice"));
  }
  return values;
}

std::string log_of(const TrainRequest& request) {
  return join_path(request.run, "drills.txt");
}

// Whether it happens now, and if so that it did, for whoever comes after this process.
bool is_due(const Drill& drill, const std::string& log) {
  if (drill.times == Drill::kAlways) return true;
  int64_t done = 0;
  std::ifstream file(log);
  for (std::string line; std::getline(file, line);) done += line == drill.text;
  if (done >= drill.times) return false;
  const std::string line = drill.text + "\n";
  const int to = ::open(log.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  const bool kept =
      to >= 0 && ::write(to, line.data(), line.size()) == ssize_t(line.size()) && ::fsync(to) == 0;
  if (to >= 0) ::close(to);
  check(kept, log, ": cannot write down that a drill happens, so it would happen again and again");
  return true;
}

void strike(Drill::Kind kind) {
  if (kind == Drill::Kind::crash) kill(getpid(), SIGKILL);
  if (kind == Drill::Kind::stop) kill(getpid(), SIGSTOP);
  while (kind == Drill::Kind::hang) std::this_thread::sleep_for(std::chrono::hours(1));
}

}  // namespace

Drill parse_drill(const std::string& text) {
  std::istringstream words(text);
  std::string name;
  words >> name;
  const auto facts = std::ranges::find_if(
      kinds(), [&](const KindFacts& candidate) { return name == candidate.name; });
  if (facts == kinds().end()) refuse(text, concat("there is no drill \"", name, "\""));
  std::map<std::string, std::string> values = values_of(text, words);
  Drill drill{.kind = facts->kind, .text = name};
  const auto take = [&](const std::string& key) {
    const auto at = values.find(key);
    if (at == values.end()) refuse(text, concat(key, " is missing"));
    const std::string value = at->second;
    values.erase(at);
    drill.text += concat(" ", key, "=", value);
    return value;
  };
  for (const std::string& key : facts->needs) {
    const std::string value = take(key);
    if (key == "rank") drill.rank = number<int>(text, key, value, 0);
    if (key == "step" || key == "from") drill.step = number<int64_t>(text, key, value, 0);
    if (key == "factor") drill.factor = number<double>(text, key, value, 1);
  }
  if (facts->counts && values.contains("times")) {
    const std::string value = values["times"];
    values.erase("times");
    drill.times = value == "always" ? Drill::kAlways : number<int64_t>(text, "times", value, 1);
    drill.text += " times=" + value;
  }
  if (!values.empty()) refuse(text, concat(name, " has no ", values.begin()->first));
  return drill;
}

void add_drill_option(CLI::App& app, std::vector<std::string>& drills) {
  app.add_option("--drill", drills,
                 "A fault on purpose, to see what becomes of it (docs/running.md), such as\n"
                 "\"crash rank=1 step=20\"; may be given again and again")
      ->type_name("\"KIND KEY=VALUE...\"")
      ->allow_extra_args(false);
}

void wire_drills(const std::vector<Drill>& drills, int rank, TrainRequest& request) {
  std::vector<Drill> before_step, before_verdict, spoil;
  for (const Drill& drill : drills) {
    if (drill.rank != rank) continue;
    (drill.kind == Drill::Kind::slow  ? before_verdict
     : drill.kind == Drill::Kind::nan ? spoil
                                      : before_step)
        .push_back(drill);
  }
  const std::string log = log_of(request);
  if (!before_step.empty())
    request.before_step = [before_step, log](int64_t step) {
      for (const Drill& drill : before_step)
        if (step == drill.step && is_due(drill, log)) strike(drill.kind);
    };
  if (!spoil.empty())
    request.spoil = [spoil, log](int64_t step) {
      return std::ranges::any_of(
          spoil, [&](const Drill& drill) { return step == drill.step && is_due(drill, log); });
    };
  if (!before_verdict.empty())
    request.before_verdict = [before_verdict](int64_t step, double seconds) {
      for (const Drill& drill : before_verdict)
        if (step >= drill.step)
          std::this_thread::sleep_for(std::chrono::duration<double>((drill.factor - 1) * seconds));
    };
}

}  // namespace moemamba
