#include "launcher/supervisor/status_answers.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <regex>
#include <set>
#include <sstream>

#include "tests/support/status_scene.h"

namespace moemamba {
namespace {

using Json = nlohmann::json;

// Answers about a run that was made up, without a server.
class StatusAnswersTest : public testing::Test {
 protected:
  HttpAnswer ask(const std::string& target) {
    now += 1;  // nothing is kept so long
    const size_t mark = target.find('?');
    HttpRequest request{.path = target.substr(0, mark), .host = "localhost"};
    if (mark != std::string::npos) request.query = target.substr(mark + 1);
    return answers.answer(request, counts);
  }
  std::string text(const std::string& target) { return *ask(target).body; }
  Json json(const std::string& target) { return Json::parse(text(target)); }
  void write(const std::string& name, const std::string& content) {
    folder.put(name, content);
    while (records.poll()) {
    }
  }
  TemporaryFolder folder;
  RunView view = scene_view();
  RunRecords records{folder.path()};
  StatusCounts counts;
  double now = 754;
  StatusAnswers answers{view, records, [this] { return now; }, {}};
};

TEST_F(StatusAnswersTest, SayWhatTheSupervisorKnows) {
  write("metrics.jsonl", scene_metrics(340));
  const Json status = json("/api/status");
  EXPECT_EQ(ask("/api/status").type, "application/json");
  EXPECT_EQ(status["state"], "training");
  EXPECT_EQ(status["healthy"], true);
  EXPECT_EQ(status["steps"], 660);
  EXPECT_EQ(status["steps_done"], 340);
  EXPECT_NEAR(status["eta_seconds"].get<double>(), 320 * 32 * 256 / 36500.0, 5);
  EXPECT_EQ(status["of_ranks"].size(), 4u);
  EXPECT_EQ(status["of_ranks"][2]["phase"], "backward");
  EXPECT_EQ(status["of_ranks"][3]["straggler"], true);
  EXPECT_EQ(status["experts"]["choices"].size(), 48u);
  EXPECT_EQ(status["experts"]["choices"][21], 1740);
  EXPECT_EQ(status["events"][3]["kind"], "lost");
  EXPECT_EQ(status["events"][3]["milliseconds_since_1970"], 1764072131000);
  EXPECT_EQ(status["latest"]["step"], 339);
  EXPECT_EQ(status["latest_evaluation"]["step"], 329);
}

TEST_F(StatusAnswersTest, AreJsonWhateverTheTexts) {
  make_weird(view);
  write("metrics.jsonl", "{\"step\":0,\"loss\":null,\"seconds\":7}\n");
  write("samples.jsonl", "{\"step\":0,\"prompt\":\"\\u0000\\ud83d\\ude00\",\"text\":\"</p>\"}\n");
  for (const char* target : {"/api/status", "/api/curves", "/api/samples"}) {
    const std::string body = text(target);
    EXPECT_FALSE(Json::parse(body, nullptr, false).is_discarded()) << target << body;
    EXPECT_EQ(body.back(), '\n');
  }
  const Json status = json("/api/status");
  EXPECT_NE(status["events"][0]["text"].get<std::string>().find("</script>"), std::string::npos);
  EXPECT_TRUE(status["of_ranks"][0]["step_seconds"].is_null());
  EXPECT_EQ(status["of_ranks"][2]["phase"], "unknown");
  EXPECT_EQ(json("/api/samples")["samples"][0]["text"], "</p>");
}

TEST_F(StatusAnswersTest, ArePossibleOfARunOfWhichNothingIsKnown) {
  view = RunView();
  for (const char* target : {"/api/status", "/api/curves", "/api/samples"})
    EXPECT_FALSE(Json::parse(text(target), nullptr, false).is_discarded()) << target;
  EXPECT_EQ(ask("/metrics").status, 200);
  EXPECT_EQ(ask("/healthz").status, 200);
}

TEST_F(StatusAnswersTest, AreHealthyUnlessTheRunHasFailedOrHangs) {
  for (const RunState state : {RunState::starting, RunState::training, RunState::recovering,
                               RunState::stopping, RunState::done, RunState::stopped}) {
    view.state = state;
    EXPECT_EQ(ask("/healthz").status, 200) << name_of(state);
    EXPECT_EQ(text("/healthz"), concat(name_of(state), "\n"));
  }
  view.state = RunState::failed;
  view.state_text = "three failures at step 12";
  EXPECT_EQ(ask("/healthz").status, 503);
  EXPECT_EQ(text("/healthz"), "failed: three failures at step 12\n");
  view.state = RunState::training;
  view.of_ranks[3].state = RankState::hanging;
  EXPECT_EQ(ask("/healthz").status, 503);
  EXPECT_EQ(text("/healthz"), "hanging: rank 3 makes no progress in step 341, phase forward\n");
  view.state = RunState::recovering;
  EXPECT_EQ(ask("/healthz").status, 200);
  view.trouble = "recovering: 3 restarts without a new checkpoint";
  EXPECT_EQ(ask("/healthz").status, 503);
  EXPECT_EQ(text("/healthz"), view.trouble + "\n");
}

TEST_F(StatusAnswersTest, GiveCurvesAsColumnsOfOneLength) {
  write("metrics.jsonl", scene_metrics(340));
  const Json curves = json("/api/curves");
  for (const char* name :
       {"loss", "ce", "ce_least", "ce_most", "grad_norm", "grad_norm_least", "grad_norm_most", "lr",
        "tokens_per_second", "dropped_rows", "val_loss", "val_bpb"})
    EXPECT_EQ(curves.at(name).size(), 340u) << name;
  EXPECT_EQ(curves["step"][339], 339);
  EXPECT_TRUE(curves["loss"][301].is_null());  // not finite
  EXPECT_TRUE(curves["val_loss"][53].is_null());
  EXPECT_TRUE(curves["val_loss"][54].is_number());
  EXPECT_EQ(json("/api/curves?from=330")["step"].size(), 10u);
  EXPECT_EQ(json("/api/curves?from=340")["step"].size(), 0u);
  for (const char* wrong :
       {"?from=-1", "?from=x", "?from=1x", "?from=", "?from=1e3", "?from=99999999999999999999"})
    EXPECT_EQ(ask(std::string("/api/curves") + wrong).status, 400) << wrong;
}

TEST_F(StatusAnswersTest, GiveAtMostTwoThousandPointsOfACurve) {
  std::string many;
  for (int step = 0; step < 20000; ++step)
    many += concat("{\"step\":", step, ",\"ce\":", step == 7777 ? 99 : 1, "}\n");
  write("metrics.jsonl", many);
  const Json curves = json("/api/curves");
  EXPECT_LE(curves["step"].size(), 1001u);
  EXPECT_GE(curves["step"].size(), 500u);
  double most = 0;
  for (const Json& value : curves["ce_most"]) most = std::max(most, value.get<double>());
  EXPECT_EQ(most, 99);
  EXPECT_EQ(json("/api/curves?from=19000")["step"].size(), 1000u);
}

TEST_F(StatusAnswersTest, AreOneDocumentForTheRoot) {
  const HttpAnswer page = ask("/");
  EXPECT_EQ(page.type, "text/html; charset=utf-8");
  EXPECT_NE(page.fields.find("default-src 'none'"), std::string::npos);
  for (const char* path : {"//", "/index.html", "/api", "/api/", "/api/status/", "/../etc/passwd",
                           "/%2e%2e/", "/favicon.ico", "/healthz%00", "/METRICS"})
    EXPECT_EQ(ask(path).status, 404) << path;
}

TEST_F(StatusAnswersTest, AreMadeSoOftenAndNoMoreHoweverManyAsk) {
  const double at = now;
  const auto made_at = [&](double when, const std::string& target) {
    now = when - 1;  // ask() adds one
    return ask(target);
  };
  const auto first = made_at(at, "/api/status");
  view.steps = 1;
  EXPECT_EQ(made_at(at + 0.2, "/api/status").body, first.body);
  EXPECT_NE(made_at(at + 0.3, "/api/status").body, first.body);
  int refused = 0;
  for (int i = 0; i < 100; ++i)
    refused += made_at(at + 0.3, concat("/api/curves?from=", i)).status == 503;
  EXPECT_GE(refused, 80);
  EXPECT_LE(refused, 85);
  EXPECT_EQ(made_at(at + 2, "/api/curves?from=1000").status, 200);
}

// The text format 0.0.4 as its page has it, line by line.
struct Family {
  std::string type;
  bool helped = false;
  std::map<std::string, double> samples;  // by name and labels
};
std::map<std::string, Family> families_of(const std::string& text) {
  static const std::regex help("# HELP ([a-z_:][a-z0-9_:]*) \\S.*"),
      type("# TYPE ([a-z_:][a-z0-9_:]*) (counter|gauge|histogram)"),
      sample(
          "(([a-z_:][a-z0-9_:]*?)(_bucket|_sum|_count)?)"
          "(\\{[a-z_]+=\"(?:[^\"\\\\\\n]|\\\\[\"\\\\n])*\"(?:,[a-z_]+=\"(?:[^\"\\\\\\n]|\\\\["
          "\"\\\\n])*\")*\\})? (\\S+)");
  EXPECT_EQ(text.back(), '\n');
  std::map<std::string, Family> families;
  std::istringstream lines(text);
  std::string current;
  for (std::string line; std::getline(lines, line);) {
    std::smatch match;
    if (std::regex_match(line, match, help)) {
      EXPECT_TRUE(families[match[1]].samples.empty()) << "HELP behind samples: " << line;
      EXPECT_FALSE(std::exchange(families[match[1]].helped, true)) << "twice: " << line;
      current = match[1];
    } else if (std::regex_match(line, match, type)) {
      EXPECT_EQ(match[1], current) << line;
      families[match[1]].type = match[2];
    } else if (std::regex_match(line, match, sample)) {
      const bool part = families.count(match[1]) == 0;
      const std::string name = part ? match[2] : match[1];
      EXPECT_EQ(name, current) << "not beside its family: " << line;
      Family& family = families[name];
      EXPECT_EQ(part, family.type == "histogram") << line;
      size_t read = 0;
      const std::string value = match[5];
      const double number = value == "NaN" ? NAN : std::stod(value, &read);
      EXPECT_TRUE(value == "NaN" || read == value.size()) << line;
      EXPECT_TRUE(family.samples.emplace(match[1].str() + match[4].str(), number).second)
          << "twice: " << line;
    } else {
      ADD_FAILURE() << "no line of the format: " << line;
    }
  }
  return families;
}

TEST_F(StatusAnswersTest, AreMetricsThatPrometheusTakes) {
  write("metrics.jsonl", scene_metrics(300));
  write("metrics.jsonl", scene_metrics(340));  // 40 of them while somebody looks
  EXPECT_EQ(ask("/metrics").type, "text/plain; version=0.0.4; charset=utf-8");
  for (const bool weird : {false, true}) {
    if (weird) make_weird(view);
    auto families = families_of(text("/metrics"));
    for (const auto& [name, family] : families) {
      EXPECT_TRUE(name.starts_with("moemamba_")) << name;
      EXPECT_TRUE(family.helped && !family.type.empty()) << name;
      EXPECT_FALSE(family.samples.empty()) << name;
      EXPECT_EQ(name.ends_with("_total"), family.type == "counter") << name;
      for (const auto& [sample, value] : family.samples)
        EXPECT_EQ(sample.find("step=\""), std::string::npos) << sample;
    }
    const auto value = [&](const std::string& sample) {
      const std::string name = "moemamba_" + sample.substr(0, sample.find('{'));
      EXPECT_TRUE(families.count(name)) << name;
      EXPECT_TRUE(families[name].samples.count("moemamba_" + sample)) << sample;
      return families[name].samples["moemamba_" + sample];
    };
    EXPECT_EQ(value("run_state{state=\"training\"}"), 1);
    EXPECT_EQ(value("run_state{state=\"failed\"}"), 0);
    EXPECT_EQ(value("steps_done"), 340);
    EXPECT_EQ(value("steps_total"), 40);
    EXPECT_EQ(value("tokens_total"), 40 * 32 * 256);
    EXPECT_EQ(value("restarts_total"), 1);
    EXPECT_EQ(value("rank_resident_memory_bytes{rank=\"1\"}"), double(int64_t(421) << 20));
    EXPECT_NEAR(value("phase_seconds_total{phase=\"forward\"}"), 40 * 0.06, 1e-3);
    EXPECT_EQ(value("layer_dead_experts{layer=\"4\"}"), 1);
    EXPECT_GT(value("expert_load_ratio{layer=\"2\",stat=\"max\"}"), 2.5);
    EXPECT_EQ(value("expert_load_ratio{layer=\"4\",stat=\"min\"}"), 0);
    EXPECT_EQ(value("learning_rate"), records.state().latest->lr);
  }
}

TEST_F(StatusAnswersTest, AreHistogramsThatAddUp) {
  write("metrics.jsonl", scene_metrics(10));
  write("metrics.jsonl", scene_metrics(30));
  const auto histogram = families_of(text("/metrics"))["moemamba_step_duration_seconds"].samples;
  const auto bucket = [&](const char* bound) {
    return histogram.at(concat("moemamba_step_duration_seconds_bucket{le=\"", bound, "\"}"));
  };
  EXPECT_EQ(bucket("0.1"), 0);
  EXPECT_EQ(bucket("0.25"), 20);
  EXPECT_EQ(bucket("300"), 20);
  EXPECT_EQ(bucket("+Inf"), 20);
  EXPECT_EQ(histogram.at("moemamba_step_duration_seconds_count"), 20);
  EXPECT_NEAR(histogram.at("moemamba_step_duration_seconds_sum"), 20 * 0.22, 1e-6);
}

// However large the run, and whatever the supervisor was told.
TEST_F(StatusAnswersTest, HaveBoundedLabels) {
  const RankView rank = view.of_ranks[0];
  view.of_ranks.assign(4096, rank);
  for (int r = 0; r < 4096; ++r) view.of_ranks[size_t(r)].rank = r;
  view.experts = {.step = 1, .layers = 2000, .experts = 4, .choices = {}};
  view.experts.choices.assign(8000, 1);
  for (const auto& [name, family] : families_of(text("/metrics")))
    EXPECT_LE(family.samples.size(), 1536u) << name;
  view.experts.choices.resize(17);  // not of the sizes that it claims
  EXPECT_EQ(families_of(text("/metrics")).count("moemamba_expert_load_ratio"), 0u);
}

// No name of a host or a folder, no text of a sample goes where metrics are collected.
TEST_F(StatusAnswersTest, TellMetricsNothingPrivate) {
  write("samples.jsonl", scene_samples());
  const std::string text = this->text("/metrics");
  for (const char* secret : {"node1", "node2", "runs/", "Elliot"})
    EXPECT_EQ(text.find(secret), std::string::npos) << secret;
}

}  // namespace
}  // namespace moemamba
