#include "tests/support/fault_test.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <sstream>

#include "core/error.h"
#include "tests/support/small_run.h"

namespace moemamba {

namespace {

// Of each step its number and the hash chain behind it, in which losses, gradient norms and samples
// of all steps so far are. Not the whole lines: a save that failed and a step that was taken twice
// are there too.
std::vector<std::string> chain_of(const std::string& run) {
  std::vector<std::string> chain;
  std::istringstream lines(read_file(join_path(run, "metrics.jsonl")));
  for (std::string line; std::getline(lines, line);) {
    const auto row = nlohmann::json::parse(line);
    chain.push_back(concat(row["step"].get<int64_t>(), " ", row["chain"].get<std::string>()));
  }
  return chain;
}

}  // namespace

double seconds_since(Launched::Clock::time_point begin) {
  return std::chrono::duration<double>(Launched::Clock::now() - begin).count();
}

std::string FaultTest::words(int64_t steps) const {
  return " --ranks 2 --launch.max_restarts=1000000 --launch.crash_loop=1000"
         " --launch.host_failures=1000 --launch.backoff_seconds=0.2"
         " --train.save_interval=20 --checkpoint.hash_interval=50 --train.progress=off"
         " --model.width=8" +
         small_training(steps);
}

FaultTest::Whole FaultTest::undisturbed(int64_t steps) const {
  const Result result = shell("$moemamba train" + words(steps));
  EXPECT_EQ(result.code, 0) << result.err;
  if (result.code != 0) return {};
  Whole whole{.chain = chain_of(run()),
              .losses = numbers_of(read_file(join_path(run(), "metrics.jsonl")), "loss"),
              .end = newest_manifest(run())};
  EXPECT_EQ(int64_t(whole.chain.size()), steps);
  clear();
  return whole;
}

void FaultTest::expect_whole(const Launched& launched, const Whole& whole) const {
  const std::vector<std::string> steps = chain_of(launched.run());
  EXPECT_EQ(steps.size(), whole.chain.size());
  for (size_t i = 0; i < std::min(steps.size(), whole.chain.size()); ++i)
    if (steps[i] != whole.chain[i]) {
      EXPECT_EQ(steps[i], whole.chain[i]) << "none before it differs";
      break;
    }
  const CheckpointManifest end = newest_manifest(launched.run());
  EXPECT_EQ(end.step(), whole.end.step());
  EXPECT_EQ(end.chain(), whole.end.chain());
  EXPECT_EQ(end.state_hash(), whole.end.state_hash());
  EXPECT_EQ(end.next_sample(), whole.end.next_sample());
  EXPECT_TRUE(file_exists(launched.run() + "/weights"));
  EXPECT_EQ(count(launched.said(), "damaged"), 0) << launched.said();
  expect_nothing_left(launched);
}

void FaultTest::expect_agrees(const Launched& launched, const Whole& whole, int64_t from) const {
  constexpr size_t kAgree = 20;    // steps; later the smallest differences have grown
  constexpr double kBound = 1e-5;  // docs/testing.md: 2.2e-7 are seen between layouts
  const std::vector<std::string> steps = chain_of(launched.run());
  const std::vector<double> losses =
      numbers_of(read_file(join_path(launched.run(), "metrics.jsonl")), "loss");
  ASSERT_EQ(steps.size(), whole.chain.size());
  ASSERT_EQ(losses.size(), steps.size());
  for (size_t i = 0; i < steps.size(); ++i) {
    ASSERT_EQ(steps[i].substr(0, steps[i].find(' ')), std::to_string(i));
    if (int64_t(i) < from) {
      ASSERT_EQ(steps[i], whole.chain[i]) << "before step " << from;
    } else if (i < size_t(from) + kAgree) {
      ASSERT_NEAR(losses[i], whole.losses[i], kBound * whole.losses[i]) << "step " << i;
    }
  }
  expect_nothing_left(launched);
}

void FaultTest::expect_listens_on(pid_t process, const std::vector<std::string>& addresses,
                                  int at_least, const Hosts* hosts) const {
  const std::string said = shell((hosts ? hosts->on(0) : "") + "ss -Hltnp").out;
  std::istringstream lines(said);
  int ports = 0;
  for (std::string line; std::getline(lines, line);) {
    if (line.find("pid=" + std::to_string(process) + ",") == std::string::npos) continue;
    std::istringstream words(line);
    std::string local;
    for (int i = 0; i < 4; ++i) words >> local;  // state, two queues, "address:port"
    const std::string address = local.substr(0, local.rfind(':'));
    EXPECT_NE(std::find(addresses.begin(), addresses.end(), address), addresses.end())
        << words_of(process, "comm") << " listens on " << local;
    ++ports;
  }
  EXPECT_GE(ports, at_least) << said;
}

void FaultTest::explain(const Launched& launched, const Launched::Before& before,
                        const Outcome& outcome, double long_seconds) {
  if (outcome.went_on() && outcome.next_step < long_seconds) return;
  std::printf("  it took long (step %lld, attempt %lld):\n", static_cast<long long>(before.steps),
              static_cast<long long>(before.attempt));
  const std::vector<LoggedEvent> events = launched.events();
  for (size_t i = before.events; i < events.size(); ++i)
    if (events[i].kind != "saved")
      std::printf("    %+8.3f s %s: %s\n", events[i].wall - before.wall, events[i].kind.c_str(),
                  events[i].text.c_str());
}

void FaultTest::expect_nothing_left(const Launched& launched) const {
  EXPECT_TRUE(wait_until([&] { return launched.processes_left().empty(); }, 15));
  for (pid_t id : launched.processes_left())
    ADD_FAILURE() << "still runs: " << id << " " << words_of(id, "cmdline");
}

void FaultTest::clear() const {
  std::filesystem::remove_all(run());
  std::filesystem::remove(*this / "said");
}

}  // namespace moemamba
