#include "runtime/tensorboard.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <map>
#include <vector>

#include "runtime/run_folder.h"
#include "tests/support/faulty_files.h"
#include "tests/support/small_run.h"
#include "tests/support/temporary_folder.h"

namespace moemamba {
namespace {

// CRC-32C bit by bit, and its mask, as TensorFlow's record_writer describes them: written for this
// test alone, from the polynomial x^32 + x^28 + x^27 + ... (0x1EDC6F41).
uint32_t crc_by_bits(std::string_view data) {
  uint32_t crc = 0xffffffffu;
  for (const char c : data)
    for (int bit = 0; bit < 8; ++bit) {
      const bool one = (crc & 1) != ((uint8_t(c) >> bit) & 1u);
      crc >>= 1;
      if (one) crc ^= 0x82f63b78u;
    }
  return ~crc;
}
uint32_t masked(uint32_t crc) {
  const uint64_t turned = (uint64_t(crc) << 17 | uint64_t(crc) >> 15) & 0xffffffffu;
  return uint32_t((turned + 0xa282ead8u) & 0xffffffffu);
}

struct Event {
  double wall_time = 0;
  int64_t step = 0;
  std::string file_version;
  std::map<std::string, float> values;
  bool start = false;
};

// Protobuf's wire format by hand: fields as (number, bytes or number).
struct Field {
  uint64_t number = 0, value = 0;
  std::string_view bytes;
};
std::vector<Field> fields_of(std::string_view data) {
  std::vector<Field> fields;
  const auto varint = [&] {
    uint64_t value = 0;
    for (int shift = 0; !data.empty(); shift += 7) {
      const auto byte = uint8_t(data.front());
      data.remove_prefix(1);
      value |= uint64_t(byte & 0x7f) << shift;
      if (byte < 0x80) break;
    }
    return value;
  };
  const auto fixed = [&](size_t size) {
    uint64_t value = 0;
    for (size_t i = 0; i < size; ++i) value |= uint64_t(uint8_t(data[i])) << (8 * i);
    data.remove_prefix(size);
    return value;
  };
  while (!data.empty()) {
    const uint64_t key = varint();
    Field field{.number = key >> 3, .value = 0, .bytes = {}};
    if ((key & 7) == 0) field.value = varint();
    if ((key & 7) == 1) field.value = fixed(8);
    if ((key & 7) == 5) field.value = fixed(4);
    if ((key & 7) == 2) {
      const uint64_t size = varint();
      field.bytes = data.substr(0, size);
      data.remove_prefix(size);
    }
    fields.push_back(field);
  }
  return fields;
}

template <class To>
To bits(uint64_t value) {
  To to;
  std::memcpy(&to, &value, sizeof to);
  return to;
}

Event event_of(std::string_view data) {
  Event event;
  for (const Field& f : fields_of(data)) {
    if (f.number == 1) event.wall_time = bits<double>(f.value);
    if (f.number == 2) event.step = int64_t(f.value);
    if (f.number == 3) event.file_version = f.bytes;
    if (f.number == 7)
      for (const Field& status : fields_of(f.bytes)) event.start = status.value == 1;
    if (f.number != 5) continue;
    for (const Field& value : fields_of(f.bytes)) {
      std::string tag;
      float number = 0;
      for (const Field& part : fields_of(value.bytes)) {
        if (part.number == 1) tag = part.bytes;
        if (part.number == 2) number = bits<float>(part.value);
      }
      event.values[tag] = number;
    }
  }
  return event;
}

// Every record of a file, each with both of its checksums held to account.
std::vector<Event> events_of(const std::string& file) {
  const std::string content = read_file(file);
  std::string_view left = content;
  std::vector<Event> events;
  const auto number = [&](size_t at, size_t size) {
    uint64_t value = 0;
    for (size_t i = 0; i < size; ++i) value |= uint64_t(uint8_t(left[at + i])) << (8 * i);
    return value;
  };
  while (left.size() >= 12) {
    const uint64_t length = number(0, 8);
    EXPECT_EQ(number(8, 4), masked(crc_by_bits(left.substr(0, 8))));
    if (left.size() < 16 + length) break;
    const std::string_view data = left.substr(12, length);
    EXPECT_EQ(number(12 + length, 4), masked(crc_by_bits(data)));
    events.push_back(event_of(data));
    left.remove_prefix(16 + length);
  }
  EXPECT_TRUE(left.empty()) << left.size() << " bytes behind the last record of " << file;
  return events;
}

std::vector<std::string> event_files(const std::string& run) {
  std::vector<std::string> files;
  for (const auto& entry : std::filesystem::directory_iterator(run + "/tensorboard"))
    files.push_back(entry.path().string());
  std::sort(files.begin(), files.end());
  return files;
}

StepRecord record(int64_t step) {
  return {.step = step,
          .loss = 3.5,
          .ce = 3.25,
          .balance_loss = 0.25,
          .grad_norm = 0.75,
          .lr = 2.9e-3,
          .tokens_per_second = 12345,
          .load_max_over_mean = 1.5,
          .dead_experts = 2,
          .dropped_rows = 7,
          .seconds = {.data = 0.001, .forward = 0.25, .exchange = 0.125, .all = 0.5}};
}

TEST(Tensorboard, KnowsTheChecksumOfTheStandard) {
  EXPECT_EQ(crc_by_bits("123456789"), 0xe3069283u);            // of every list of CRCs
  EXPECT_EQ(crc_by_bits(std::string(32, '\0')), 0x8a9136aau);  // RFC 3720, B.4
  EXPECT_EQ(masked_crc32c("123456789"), masked(0xe3069283u));
}

TEST(Tensorboard, WritesEveryNumberOfAStep) {
  TemporaryFolder folder;
  PosixFileSystem files;
  TensorboardWriter writer(files, folder.path(), 0);
  auto full = record(7);
  full.val_loss = 3.75;
  full.val_bpb = 1.875;
  writer.record(full);
  const auto names = event_files(folder.path());
  ASSERT_EQ(names.size(), 1u);
  EXPECT_NE(names[0].find("/tensorboard/events.out.tfevents."), std::string::npos);
  const auto events = events_of(names[0]);
  ASSERT_EQ(events.size(), 5u);
  EXPECT_EQ(events[0].file_version, "brain.Event:2");
  EXPECT_TRUE(events[1].start);
  EXPECT_EQ(events[1].step, 0);
  const std::map<std::string, float> expected = {{"train/loss", 3.5f},
                                                 {"train/cross_entropy", 3.25f},
                                                 {"train/balance_loss", 0.25f},
                                                 {"train/z_loss", 0.0f},
                                                 {"train/grad_norm", 0.75f},
                                                 {"train/learning_rate", 2.9e-3f},
                                                 {"train/tokens_per_second", 12345.0f},
                                                 {"moe/load_max_over_mean", 1.5f},
                                                 {"moe/dead_experts", 2.0f},
                                                 {"moe/dropped_rows", 7.0f},
                                                 {"seconds/step", 0.5f},
                                                 {"seconds/data", 0.001f},
                                                 {"seconds/forward", 0.25f},
                                                 {"seconds/backward", 0.0f},
                                                 {"seconds/exchange", 0.125f},
                                                 {"seconds/reduction", 0.0f},
                                                 {"seconds/optimizer", 0.0f}};
  EXPECT_EQ(events[2].values, expected);
  EXPECT_EQ(events[2].step, 7);
  EXPECT_GT(events[2].wall_time, 1.7e9);
  EXPECT_EQ(events[3].values, (std::map<std::string, float>{{"validation/loss", 3.75f}}));
  EXPECT_EQ(events[3].step, 7);
  EXPECT_EQ(events[4].values, (std::map<std::string, float>{{"validation/bits_per_byte", 1.875f}}));
  EXPECT_EQ(events[4].step, 7);
}

TEST(Tensorboard, KeepsWhatIsNotFinite) {
  TemporaryFolder folder;
  PosixFileSystem files;
  TensorboardWriter writer(files, folder.path(), 0);
  auto bad = record(INT64_MAX);
  bad.loss = NAN;
  bad.grad_norm = HUGE_VAL;
  writer.record(bad);
  const auto events = events_of(event_files(folder.path())[0]);
  EXPECT_TRUE(std::isnan(events[2].values.at("train/loss")));
  EXPECT_TRUE(std::isinf(events[2].values.at("train/grad_norm")));
  EXPECT_EQ(events[2].step, INT64_MAX);
}

// A launch that goes on in the second in which the first began still comes behind it.
TEST(Tensorboard, PutsALaterLaunchBehindAnEarlierOne) {
  TemporaryFolder folder;
  PosixFileSystem files;
  for (const int64_t first : {0, 5, 3}) {
    TensorboardWriter writer(files, folder.path(), first);
    for (int64_t step = first; step < first + 4; ++step) writer.record(record(step));
  }
  const auto names = event_files(folder.path());
  ASSERT_EQ(names.size(), 3u);
  std::vector<int64_t> begins;
  for (const std::string& name : names) {
    const auto events = events_of(name);
    ASSERT_EQ(events.size(), 6u);
    EXPECT_TRUE(events[1].start);
    begins.push_back(events[1].step);
  }
  EXPECT_EQ(begins, (std::vector<int64_t>{0, 5, 3}));
}

TEST(Tensorboard, LosesRecordsNotTheRunOnAFullDisk) {
  TemporaryFolder folder;
  FaultyFiles disk;
  testing::internal::CaptureStderr();
  TensorboardWriter writer(disk, folder.path(), 0);
  writer.record(record(0));
  disk.operations_left = 0;
  for (int64_t step = 1; step <= 3; ++step) writer.record(record(step));
  disk.operations_left = 1000;  // somebody made room
  writer.record(record(4));
  disk.operations_left = 0;
  TensorboardWriter nowhere(disk, folder / "other", 0);
  nowhere.record(record(0));
  nowhere.go_back_to(0);
  const std::string said = testing::internal::GetCapturedStderr();
  EXPECT_EQ(writer.lost_records(), 3);
  std::vector<int64_t> steps;
  for (const Event& event : events_of(event_files(folder.path())[0]))
    if (!event.values.empty()) steps.push_back(event.step);
  EXPECT_EQ(steps, (std::vector<int64_t>{0, 4}));
  EXPECT_EQ(std::count(said.begin(), said.end(), '\n'), 2) << said;  // each said once
}

// What is left for a reader that follows START as TensorBoard does is every step once.
TEST(Tensorboard, IsTheSameAsTheMetricsOfARunThatWasResumedAndRolledBack) {
  TemporaryFolder folder;
  SmallRun run{.folder = folder / "run", .steps = 8, .save_interval = 3};
  run.launch_steps = 5;
  launch(run);
  run.launch_steps = 0;
  int bad = 2;  // step 6, and again: back to the checkpoint
  run.spoil = [&](int, int64_t step) { return step == 6 && bad-- > 0; };
  launch(run);
  std::map<int64_t, float> losses;
  int starts = 0;
  for (const std::string& file : event_files(run.folder))
    for (const Event& event : events_of(file)) {
      starts += event.start;
      if (event.start) losses.erase(losses.lower_bound(event.step), losses.end());
      if (event.values.count("train/loss")) losses[event.step] = event.values.at("train/loss");
    }
  EXPECT_EQ(starts, 3);
  EXPECT_EQ(event_files(run.folder).size(), 2u);
  const std::string metrics = read_file(run.folder + "/metrics.jsonl");
  ASSERT_EQ(losses.size(), 8u);
  size_t at = 0;
  for (const auto& [step, loss] : losses) {
    at = metrics.find("\"loss\":", at) + 7;
    EXPECT_EQ(float(std::atof(metrics.c_str() + at)), loss) << step;
  }
}

TEST(Tensorboard, IsLeftOutWhereItIsNotWanted) {
  TemporaryFolder folder;
  launch({.folder = folder / "run", .steps = 2, .train = "tensorboard: false"});
  EXPECT_FALSE(file_exists(folder / "run/tensorboard"));
}

}  // namespace
}  // namespace moemamba
