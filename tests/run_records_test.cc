#include "runtime/run_records.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "runtime/json_text.h"
#include "tests/support/temporary_folder.h"

namespace moemamba {
namespace {

// The lines that a tail hands out, and "ANEW" where it says so.
std::vector<std::string> polled(LineTail& tail, size_t most = 1 << 16) {
  std::vector<std::string> lines;
  while (tail.poll(
      most, [&] { lines.emplace_back("ANEW"); },
      [&](std::string_view line) { lines.emplace_back(line); })) {
  }
  return lines;
}

void append(const std::string& file, const std::string& text) {
  std::ofstream(file, std::ios::app | std::ios::binary) << text;
}

using Lines = std::vector<std::string>;

TEST(LineTail, HandsOutWholeLinesOnce) {
  TemporaryFolder folder;
  const std::string file = folder / "lines";
  LineTail tail(file, 100);
  EXPECT_EQ(polled(tail), Lines());  // it is not there yet
  append(file, "one\ntwo\nthr");
  EXPECT_EQ(polled(tail), (Lines{"one", "two"}));
  EXPECT_EQ(polled(tail), Lines());
  append(file, "ee\n\n");
  EXPECT_EQ(polled(tail), (Lines{"three", ""}));
}

TEST(LineTail, BeginsAnewWhereTheFileIsAnotherOne) {
  TemporaryFolder folder;
  const std::string file = folder / "lines";
  append(file, "one\ntwo\n");
  LineTail tail(file, 100);
  EXPECT_EQ(polled(tail).size(), 2u);
  // Cut as on a resume: another file of the same name, as long as the first one or longer.
  append(folder / "next", "one\n2\n3\n4\n");
  std::filesystem::rename(folder / "next", file);
  EXPECT_EQ(polled(tail), (Lines{"ANEW", "one", "2", "3", "4"}));
  std::filesystem::resize_file(file, 4);
  EXPECT_EQ(polled(tail), (Lines{"ANEW", "one"}));
  std::filesystem::remove(file);
  EXPECT_EQ(polled(tail), Lines{"ANEW"});
  EXPECT_EQ(polled(tail), Lines());
  append(file, "five\n");
  EXPECT_EQ(polled(tail), Lines{"five"});
}

TEST(LineTail, DoesNotMindATornLineThatIsWrittenAgain) {
  TemporaryFolder folder;
  const std::string file = folder / "lines";
  append(file, "one\ntw");
  LineTail tail(file, 100);
  EXPECT_EQ(polled(tail), Lines{"one"});
  std::filesystem::resize_file(file, 4);
  append(file, "three\n");
  EXPECT_EQ(polled(tail), Lines{"three"});
}

TEST(LineTail, LeavesOutLinesThatAreTooLong) {
  TemporaryFolder folder;
  const std::string file = folder / "lines";
  LineTail tail(file, 5);
  append(file, "12345\n123456\nok\n" + std::string(1000, 'x'));
  EXPECT_EQ(polled(tail, 7), (Lines{"12345", "ok"}));
  append(file, std::string(1000, 'x') + "\nend\n");
  EXPECT_EQ(polled(tail, 7), Lines{"end"});
}

TEST(LineTail, ReadsNothingButFiles) {
  TemporaryFolder folder;
  ASSERT_EQ(system(("mkfifo " + folder / "pipe").c_str()), 0);
  for (const std::string& path : {folder / "pipe", folder.path(), std::string("/dev/zero")}) {
    LineTail tail(path, 100);
    EXPECT_EQ(polled(tail), Lines()) << path;
  }
}

StepValues values(float loss) {
  StepValues all;
  all.fill(NAN);
  all[size_t(Column::loss)] = loss;
  return all;
}

TEST(Curves, KeepTheNewestStepsOneByOne) {
  Curves curves(8);
  for (int64_t step = 0; step < 1000; ++step) curves.add(step, values(float(step)));
  const auto rows = curves.rows(0, 1 << 20);
  EXPECT_LE(rows.size(), 8u * 8);  // a level holds eight; 1000 steps are in 7 of them
  int64_t next = 0;
  for (const CurveRow& row : rows) {
    EXPECT_EQ(row.first, next);
    next = row.last + 1;
    const CurveValue& loss = row[Column::loss];
    EXPECT_EQ(loss.count, row.last - row.first + 1);
    EXPECT_EQ(loss.least, float(row.first));
    EXPECT_EQ(loss.most, float(row.last));
    EXPECT_NEAR(loss.mean, double(row.first + row.last) / 2, 1e-3);
  }
  EXPECT_EQ(next, 1000);
  EXPECT_EQ(curves.last_step(), 999);
  for (size_t i = rows.size() - 8; i < rows.size(); ++i) EXPECT_EQ(rows[i].first, rows[i].last);
}

TEST(Curves, TakeLittleMemoryForManySteps) {
  Curves curves;
  for (int64_t step = 0; step < 1000000; ++step) curves.add(step, values(1));
  EXPECT_LE(curves.rows(0, SIZE_MAX).size(), 4096u * 9);
}

// A single step that is out of line is seen however few points are asked for.
TEST(Curves, KeepExtremesInFewPoints) {
  for (const int64_t odd : {int64_t(0), int64_t(123456), int64_t(199999)}) {
    Curves curves;
    for (int64_t step = 0; step < 200000; ++step)
      curves.add(step, values(step == odd ? 1000 : step == 77777 ? -1000 : 1));
    const auto rows = curves.rows(0, 100);
    EXPECT_LE(rows.size(), 51u);
    EXPECT_GE(rows.size(), 25u);
    float most = 0, least = 0;
    for (const CurveRow& row : rows) {
      most = std::max(most, row[Column::loss].most);
      least = std::min(least, row[Column::loss].least);
      if (row[Column::loss].most > 1) {
        EXPECT_TRUE(row.first <= odd && odd <= row.last);
      }
    }
    EXPECT_EQ(most, 1000);
    EXPECT_EQ(least, -1000);
    EXPECT_EQ(rows.front().first, 0);
    EXPECT_EQ(rows.back().last, 199999);
  }
}

TEST(Curves, BeginWhereTheyAreAskedTo) {
  Curves curves;
  for (int64_t step = 0; step < 100; ++step) curves.add(step, values(1));
  EXPECT_EQ(curves.rows(90, 100).size(), 10u);
  EXPECT_EQ(curves.rows(90, 100).front().first, 90);
  EXPECT_TRUE(curves.rows(100, 100).empty());
  EXPECT_TRUE(curves.rows(INT64_MAX, 100).empty());
  EXPECT_TRUE(Curves().rows(0, 100).empty());
  EXPECT_TRUE(Curves().empty());
}

TEST(Curves, ForgetWhatIsTakenAgain) {
  Curves curves(4);
  for (int64_t step = 0; step < 100; ++step) curves.add(step, values(1));
  curves.add(50, values(2));
  const auto rows = curves.rows(0, SIZE_MAX);
  EXPECT_EQ(rows.back().first, 50);
  EXPECT_EQ(rows.back()[Column::loss].most, 2);
  for (size_t i = 1; i < rows.size(); ++i) EXPECT_GT(rows[i].first, rows[i - 1].last);
  curves.add(0, values(3));
  EXPECT_EQ(curves.rows(0, SIZE_MAX).size(), 1u);
}

TEST(Curves, LeaveWhatIsNotFiniteOut) {
  Curves curves(2);
  for (const float loss : {1.0f, NAN, HUGE_VALF, 3.0f, NAN, NAN, NAN, NAN})
    curves.add(curves.last_step() + 1, values(loss));
  const auto rows = curves.rows(0, 2);
  ASSERT_FALSE(rows.empty());
  const CurveValue& all = rows[0][Column::loss];
  EXPECT_EQ(all.count, 2);
  EXPECT_EQ(all.mean, 2);
  EXPECT_EQ(all.most, 3);
}

// A line of metrics.jsonl.
std::string line_of(StepRecord record) {
  char line[kMetricsLine];
  return std::string(line, format_metrics(record, line, sizeof line)) + "\n";
}

void read_all(RunRecords& records) {
  while (records.poll()) {
  }
}

TEST(RunRecords, KnowTheLatestStepAndEvaluation) {
  TemporaryFolder folder;
  RunRecords records(folder.path());
  read_all(records);
  EXPECT_FALSE(records.state().latest);
  EXPECT_FALSE(records.state().behind);
  StepRecord step{.step = 4, .loss = 2.5, .ce = 2.25, .lr = 1e-3, .tokens_per_second = 100};
  step.val_loss = 3;
  step.dropped_rows = 6;
  append(folder / "metrics.jsonl", line_of(step));
  step.step = 5;
  step.val_loss.reset();
  step.loss = NAN;
  step.skipped = true;
  step.tokens_per_second = 300;
  append(folder / "metrics.jsonl", line_of(step) + "{\"step\":6,\"loss\":");
  read_all(records);
  const RunRecords::State state = records.state();
  ASSERT_TRUE(state.latest && state.latest_evaluation);
  EXPECT_EQ(state.latest->step, 5);
  EXPECT_TRUE(std::isnan(state.latest->loss));
  EXPECT_TRUE(state.latest->skipped);
  EXPECT_EQ(state.latest_evaluation->step, 4);
  EXPECT_EQ(*state.latest_evaluation->val_loss, 3);
  EXPECT_DOUBLE_EQ(state.tokens_per_second, 150);  // the same work in 3 + 1 of 6 times
  EXPECT_EQ(records.rows(0, 100).size(), 2u);
}

// What was there before somebody followed the run is in its curves, but nobody has seen it happen.
TEST(RunRecords, CountTheStepsThatTheySee) {
  TemporaryFolder folder;
  StepRecord step{.loss = 2.5};
  step.seconds.all = 0.3;
  step.seconds.forward = 0.1;
  step.dropped_rows = 2;
  for (step.step = 0; step.step < 10; ++step.step) append(folder / "metrics.jsonl", line_of(step));
  RunRecords records(folder.path());
  read_all(records);
  EXPECT_EQ(records.state().totals.steps, 0);
  for (; step.step < 14; ++step.step) append(folder / "metrics.jsonl", line_of(step));
  read_all(records);
  // A resume: another file with the first 12 steps, and two of them taken again.
  std::filesystem::rename(folder / "metrics.jsonl", folder / "old");
  for (step.step = 0; step.step < 12; ++step.step) append(folder / "metrics.jsonl", line_of(step));
  read_all(records);
  for (; step.step < 14; ++step.step) append(folder / "metrics.jsonl", line_of(step));
  read_all(records);
  const RecordTotals totals = records.state().totals;
  EXPECT_EQ(totals.steps, 6);
  EXPECT_EQ(totals.dropped_rows, 12);
  EXPECT_NEAR(totals.seconds.forward, 0.6, 1e-6);
  EXPECT_EQ(totals.durations[6], 6);  // of 0.25 to 0.5 s
  EXPECT_EQ(records.state().epoch, 1);
  EXPECT_EQ(records.rows(0, 100).size(), 14u);
}

// Whoever looks meanwhile sees the curves as they were, not a part of what takes their place.
TEST(RunRecords, ShowTheOldCurvesUntilTheNewOnesAreRead) {
  TemporaryFolder folder;
  std::string old, next;
  for (int64_t step = 0; step < 10; ++step) old += line_of({.step = step, .loss = 1});
  for (int64_t step = 0; step < 5000; ++step) next += line_of({.step = step, .loss = 2});
  append(folder / "metrics.jsonl", old);
  RunRecords records(folder.path());
  read_all(records);
  append(folder / "next", next);
  std::filesystem::rename(folder / "next", folder / "metrics.jsonl");
  int rounds = 0;
  while (records.poll()) {
    ++rounds;
    EXPECT_EQ(records.rows(0, 100).size(), 10u);
    EXPECT_EQ(records.state().epoch, 0);
    EXPECT_TRUE(records.state().behind);
  }
  EXPECT_GT(rounds, 1);
  EXPECT_EQ(records.state().epoch, 1);
  EXPECT_EQ(records.state().latest->step, 4999);
}

TEST(RunRecords, ForgetARunThatIsReplaced) {
  TemporaryFolder folder;
  append(folder / "metrics.jsonl", line_of({.step = 3}));
  append(folder / "samples.jsonl", "{\"step\":3,\"prompt\":\"a\",\"text\":\"b\"}\n");
  RunRecords records(folder.path());
  read_all(records);
  EXPECT_EQ(records.samples().size(), 1u);
  std::filesystem::remove(folder / "metrics.jsonl");
  std::filesystem::remove(folder / "samples.jsonl");
  read_all(records);
  EXPECT_FALSE(records.state().latest);
  EXPECT_TRUE(records.rows(0, 10).empty());
  EXPECT_TRUE(records.samples().empty());
}

TEST(RunRecords, TakeNothingFromLinesThatAreNone) {
  TemporaryFolder folder;
  for (const char* line :
       {"", "{}", "[]", "null", "7", "{\"step\":\"4\"}", "{\"step\":4.5}", "{\"step\":-1}",
        "{\"step\":1e30}", "{\"step\":4", "\xff\xfe", "{\"step\":4}{\"step\":5}"})
    append(folder / "metrics.jsonl", std::string(line) + "\n");
  append(folder / "metrics.jsonl", std::string(100000, '[') + "\n");
  append(folder / "metrics.jsonl",
         "{\"step\":7,\"loss\":\"x\",\"seconds\":[],\"skipped\":1,\"dropped_rows\":null}\n");
  RunRecords records(folder.path());
  read_all(records);
  ASSERT_EQ(records.rows(0, 100).size(), 1u);
  EXPECT_EQ(records.state().latest->step, 7);
  EXPECT_TRUE(std::isnan(records.state().latest->loss));
}

TEST(RunRecords, KeepTheNewestTenSamples) {
  TemporaryFolder folder;
  for (int step = 0; step < 25; ++step)
    append(folder / "samples.jsonl", concat("{\"step\":", step, ",\"prompt\":\"It was\",\"text\":",
                                            json_text(std::string(100000, 'x')), "}\n"));
  RunRecords records(folder.path());
  read_all(records);
  const auto samples = records.samples();
  ASSERT_EQ(samples.size(), 10u);
  EXPECT_EQ(samples.front().step, 15);
  EXPECT_EQ(samples.back().step, 24);
  EXPECT_EQ(samples.back().prompt, "It was");
  EXPECT_EQ(samples.back().text.size(), size_t(16 << 10));
}

}  // namespace
}  // namespace moemamba
