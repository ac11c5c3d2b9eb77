#include "runtime/metrics.h"

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "runtime/progress.h"
#include "runtime/run_folder.h"
#include "tests/support/faulty_files.h"
#include "tests/support/temporary_folder.h"

namespace moemamba {
namespace {

StepRecord record(int64_t step) {
  return {.step = step,
          .loss = 3.4121,
          .ce = 3.4,
          .balance_loss = 0.0121,
          .grad_norm = 0.81,
          .lr = 2.9e-3,
          .tokens_per_second = 12345,
          .load_max_over_mean = 1.31,
          .dead_experts = 0,
          .dropped_rows = 4,
          .seconds = {.data = 0.001, .forward = 0.2, .backward = 0.4}};
}

std::string metrics_line(const StepRecord& record) {
  char buffer[kMetricsLine];
  return std::string(buffer, format_metrics(record, buffer, sizeof(buffer)));
}

TEST(Metrics, HoldsEveryFieldOfAStep) {
  auto full = record(7);
  EXPECT_FALSE(nlohmann::json::parse(metrics_line(full)).contains("val_loss"));
  full.val_loss = 3.5;
  full.val_bpb = 1.75;
  const auto row = nlohmann::json::parse(metrics_line(full));
  for (const char* name :
       {"step", "loss", "ce", "balance_loss", "z_loss", "grad_norm", "lr", "tokens_per_second",
        "load_max_over_mean", "dead_experts", "dropped_rows", "val_loss", "val_bpb"})
    EXPECT_TRUE(row.at(name).is_number()) << name;
  for (const char* name : {"data", "forward", "backward", "exchange", "reduction", "optimizer"})
    EXPECT_TRUE(row.at("seconds").at(name).is_number()) << name;
  EXPECT_EQ(row["step"], 7);
  EXPECT_EQ(row["dropped_rows"], 4);
  EXPECT_FALSE(row.contains("failed_saves"));
  for (const char* name : {"replays", "skipped"}) EXPECT_FALSE(row.contains(name)) << name;
  full.failed_saves = 2;
  full.replays = 1;
  full.skipped = true;
  const auto troubled = nlohmann::json::parse(metrics_line(full));
  EXPECT_EQ(troubled["failed_saves"], 2);
  EXPECT_EQ(troubled["replays"], 1);
  EXPECT_EQ(troubled["skipped"], true);
}

TEST(Metrics, GivesFloatsBackExactly) {
  for (const float value : {0.1f, 1e-30f, 3.4028235e38f, 1 / 3.0f}) {
    auto one = record(0);
    one.loss = value;
    EXPECT_EQ(nlohmann::json::parse(metrics_line(one))["loss"].get<float>(), value);
  }
}

TEST(Metrics, StaysJsonWhateverTheNumbers) {
  StepRecord worst;
  const double nan = std::nan("");
  for (const double value : {nan, HUGE_VAL, -HUGE_VAL, -1.79769313486231571e308}) {
    for (double* field :
         {&worst.loss, &worst.ce, &worst.balance_loss, &worst.z_loss, &worst.grad_norm, &worst.lr,
          &worst.tokens_per_second, &worst.load_max_over_mean, &worst.seconds.data,
          &worst.seconds.forward, &worst.seconds.backward, &worst.seconds.exchange,
          &worst.seconds.reduction, &worst.seconds.optimizer})
      *field = value;
    worst.val_loss = worst.val_bpb = value;
    worst.step = worst.dead_experts = worst.dropped_rows = worst.failed_saves = INT64_MIN;
    worst.replays = INT64_MIN;
    worst.skipped = true;
    const auto row = nlohmann::json::parse(metrics_line(worst));
    EXPECT_EQ(row["loss"].is_null(), !std::isfinite(value));
  }
}

TEST(Metrics, AppendsToWhatIsThere) {
  TemporaryFolder folder;
  PosixFileSystem files;
  for (int64_t step = 1; step <= 3; ++step)
    MetricsWriter(files, folder / "metrics.jsonl").record(record(step));
  EXPECT_EQ(read_file(folder / "metrics.jsonl"), metrics_line(record(1)) + "\n" +
                                                     metrics_line(record(2)) + "\n" +
                                                     metrics_line(record(3)) + "\n");
}

TEST(Metrics, AreCutWhereARunGoesBackAndGrowOnBehindThat) {
  TemporaryFolder folder;
  PosixFileSystem files;
  MetricsWriter writer(files, folder / "metrics.jsonl");
  for (int64_t step = 0; step < 4; ++step) writer.record(record(step));
  writer.cut(2);
  writer.record(record(2));
  EXPECT_EQ(read_file(folder / "metrics.jsonl"), metrics_line(record(0)) + "\n" +
                                                     metrics_line(record(1)) + "\n" +
                                                     metrics_line(record(2)) + "\n");
}

TEST(Metrics, LosesLinesNotTheRunOnAFullDisk) {
  TemporaryFolder folder;
  FaultyFiles disk;
  MetricsWriter writer(disk, folder / "metrics.jsonl");
  testing::internal::CaptureStderr();
  writer.record(record(1));
  disk.operations_left = 0;
  for (int64_t step = 2; step <= 4; ++step) writer.record(record(step));
  disk.operations_left = 1000;  // somebody made room
  writer.record(record(5));
  writer.record(record(6));
  const std::string said = testing::internal::GetCapturedStderr();
  EXPECT_EQ(writer.lost_lines(), 3);
  EXPECT_EQ(read_file(folder / "metrics.jsonl"), metrics_line(record(1)) + "\n" +
                                                     metrics_line(record(5)) + "\n" +
                                                     metrics_line(record(6)) + "\n");
  EXPECT_NE(said.find("no space left"), std::string::npos);
  EXPECT_EQ(std::count(said.begin(), said.end(), '\n'), 1);  // said once
}

TEST(Progress, SaysAllInOneLine) {
  const ProgressOptions options{
      .steps = 2000, .experts = 32, .routed_rows = 1000, .bytes_per_token = 3.7};
  char buffer[kProgressLine];
  const auto line = [&](const ProgressOptions& o, const StepRecord& r, double eta) {
    return std::string(buffer, format_progress(o, r, eta, buffer, sizeof(buffer)));
  };
  EXPECT_EQ(line(options, record(119), 252),
            "step 120/2000  loss 3.4121 (bpb 1.33)  lr 2.9e-3  gnorm 0.81  aux 0.0121  "
            "load max 1.31x dead 0/32  drop 0.4%  12.3k tok/s  eta 04:12");
  EXPECT_EQ(line({.steps = 3}, record(0), -1),
            "step 1/3  loss 3.4121  lr 2.9e-3  gnorm 0.81  12.3k tok/s  eta --:--");
  auto unsaved = record(0);
  unsaved.failed_saves = 2;
  EXPECT_EQ(line({.steps = 3}, unsaved, -1),
            "step 1/3  loss 3.4121  lr 2.9e-3  gnorm 0.81  12.3k tok/s  eta --:--  NOT SAVED 2x");
  auto skipped = record(0);
  skipped.skipped_steps = 3;
  EXPECT_EQ(line({.steps = 3}, skipped, -1),
            "step 1/3  loss 3.4121  lr 2.9e-3  gnorm 0.81  12.3k tok/s  eta --:--  SKIPPED 3x");
  ProgressOptions narrow = options;
  narrow.brief = true;
  EXPECT_EQ(
      line(narrow, record(119), 252),
      "step 120/2000  loss 3.4121 (bpb 1.33)  load max 1.31x dead 0/32  12.3k tok/s  eta 04:12");
  auto worst = record(INT64_MIN);
  worst.loss = worst.grad_norm = worst.tokens_per_second = worst.lr = -1.7e308;
  worst.failed_saves = worst.skipped_steps = INT64_MAX;
  EXPECT_LT(line(options, worst, 1e300).size(), kProgressLine);
}

TEST(Progress, WritesDurations) {
  EXPECT_EQ(format_duration(0), "00:00");
  EXPECT_EQ(format_duration(252), "04:12");
  EXPECT_EQ(format_duration(3852), "1:04:12");
  EXPECT_EQ(format_duration(2 * 86400 + 3 * 3600 + 240), "2d 03:04");
}

TEST(Progress, RedrawsOnATerminalAndPrintsPlainLinesElsewhere) {
  for (const bool terminal : {false, true}) {
    char* text = nullptr;
    size_t size = 0;
    FILE* out = open_memstream(&text, &size);
    {
      Progress progress(out, {.steps = 3, .terminal = terminal, .steps_between_lines = 2});
      for (int64_t step = 0; step < 3; ++step) progress.update(record(step));
      progress.say("validation 1.75");
    }
    std::fclose(out);
    const std::string said(text, size);
    free(text);
    EXPECT_EQ(said.find('\r') != std::string::npos, terminal);
    EXPECT_NE(said.find("step 1/3"), std::string::npos);
    EXPECT_NE(said.find("step 3/3"), std::string::npos);
    EXPECT_NE(said.find("validation 1.75\n"), std::string::npos);
    EXPECT_EQ(said.find("\033[1m"), std::string::npos);  // no colour unless asked for
    EXPECT_EQ(std::count(said.begin(), said.end(), '\n'), terminal ? 2 : 4);
  }
}

TEST(Progress, IsSparingWithPlainLines) {
  char* text = nullptr;
  size_t size = 0;
  FILE* out = open_memstream(&text, &size);
  {
    Progress progress(out, {.steps = 1000});
    for (int64_t step = 0; step < 1000; ++step) progress.update(record(step));
    Progress stopped(out, {.steps = 1000});
    for (int64_t step = 0; step < 7; ++step) stopped.update(record(step), step == 6);
  }
  std::fclose(out);
  const std::string said(text, size);
  free(text);
  for (const char* line : {"step 1/1000 ", "step 1000/1000 ", "step 7/1000 "})
    EXPECT_NE(said.find(line), std::string::npos) << said;
  EXPECT_LT(std::count(said.begin(), said.end(), '\n'), 20);  // 4, and one each 5 s
}

TEST(RunFolder, RefusesAnotherRunUnlessToldToReplaceIt) {
  TemporaryFolder folder;
  PosixFileSystem files;
  const std::string run = folder / "runs/a";
  EXPECT_EQ(claim_run_folder(files, run, "seed: 1\n", false), run);
  EXPECT_EQ(read_file(run + "/config.textproto"), "seed: 1\n");
  files.make_folders(run + "/weights");
  folder.put("runs/a/weights/w", "1");
  EXPECT_NE(message_of([&] {
              claim_run_folder(files, run, "seed: 2\n", false);
            }).find("already holds a run"),
            std::string::npos);
  EXPECT_EQ(read_file(run + "/config.textproto"), "seed: 1\n");
  claim_run_folder(files, run, "seed: 2\n", true);
  EXPECT_EQ(read_file(run + "/config.textproto"), "seed: 2\n");
  EXPECT_FALSE(file_exists(run + "/weights"));
}

TEST(RunFolder, NeverTouchesFilesThatAreNoRuns) {
  TemporaryFolder folder;
  PosixFileSystem files;
  folder.put("thesis.tex", "ten years");
  for (const bool overwrite : {false, true})
    EXPECT_THROW(claim_run_folder(files, folder.path(), "", overwrite), Error);
  EXPECT_EQ(read_file(folder / "thesis.tex"), "ten years");
}

}  // namespace
}  // namespace moemamba
