#include "runtime/tensorboard.h"

#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>

#include "core/error.h"

namespace moemamba {

namespace {

constexpr size_t kMostEvent = 4096;
constexpr const char* kPrefix = "events.out.tfevents.";

struct Scalar {
  const char* tag;
  double (*value)(const StepRecord& record);
};
constexpr Scalar kOfStep[] = {
    {"train/loss", [](const StepRecord& r) { return r.loss; }},
    {"train/cross_entropy", [](const StepRecord& r) { return r.ce; }},
    {"train/balance_loss", [](const StepRecord& r) { return r.balance_loss; }},
    {"train/z_loss", [](const StepRecord& r) { return r.z_loss; }},
    {"train/grad_norm", [](const StepRecord& r) { return r.grad_norm; }},
    {"train/learning_rate", [](const StepRecord& r) { return r.lr; }},
    {"train/tokens_per_second", [](const StepRecord& r) { return r.tokens_per_second; }},
    {"moe/load_max_over_mean", [](const StepRecord& r) { return r.load_max_over_mean; }},
    {"moe/dead_experts", [](const StepRecord& r) { return double(r.dead_experts); }},
    {"moe/dropped_rows", [](const StepRecord& r) { return double(r.dropped_rows); }},
    {"seconds/step", [](const StepRecord& r) { return r.seconds.all; }},
    {"seconds/data", [](const StepRecord& r) { return r.seconds.data; }},
    {"seconds/forward", [](const StepRecord& r) { return r.seconds.forward; }},
    {"seconds/backward", [](const StepRecord& r) { return r.seconds.backward; }},
    {"seconds/exchange", [](const StepRecord& r) { return r.seconds.exchange; }},
    {"seconds/reduction", [](const StepRecord& r) { return r.seconds.reduction; }},
    {"seconds/optimizer", [](const StepRecord& r) { return r.seconds.optimizer; }},
};
constexpr std::array<uint32_t, 256> crc_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t c = i;
    for (int bit = 0; bit < 8; ++bit) c = c & 1 ? 0x82f63b78 ^ (c >> 1) : c >> 1;
    table[i] = c;
  }
  return table;
}

double wall_seconds() {
  using std::chrono::system_clock;
  return std::chrono::duration<double>(system_clock::now().time_since_epoch()).count();
}

std::string host_name() {
  char name[256] = "localhost";
  gethostname(name, sizeof name - 1);
  std::string host = name;
  for (char& c : host)
    if (!isalnum(static_cast<unsigned char>(c)) && c != '-') c = '_';
  return host;
}

// TensorBoard reads files in the order of their names: a later one than all that are there.
int64_t seconds_for_name(const std::string& folder) {
  int64_t seconds = int64_t(wall_seconds());
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    const std::string name = entry.path().filename().string();
    if (name.rfind(kPrefix, 0) == 0)
      seconds = std::max<int64_t>(seconds, std::atoll(name.c_str() + std::strlen(kPrefix)) + 1);
  }
  return seconds;
}

}  // namespace

uint32_t masked_crc32c(std::string_view data) {
  static constexpr std::array<uint32_t, 256> kTable = crc_table();
  uint32_t c = 0xffffffff;
  for (const char byte : data) c = kTable[(c ^ uint8_t(byte)) & 0xff] ^ (c >> 8);
  c = ~c;
  return ((c >> 15) | (c << 17)) + 0xa282ead8;
}

TensorboardWriter::TensorboardWriter(FileSystem& files, const std::string& run, int64_t first_step)
    : buffer_(kMostEvent + kTensorboardFrame) {
  for (const Scalar& scalar : kOfStep) step_.mutable_summary()->add_value()->set_tag(scalar.tag);
  held_out_loss_.mutable_summary()->add_value()->set_tag("validation/loss");
  held_out_bits_.mutable_summary()->add_value()->set_tag("validation/bits_per_byte");
  try {
    open(files, run);
  } catch (const Error& error) {
    std::fprintf(stderr, "tensorboard: %s; training goes on without its records\n", error.what());
    return;
  }
  TensorboardEvent version;
  version.set_file_version("brain.Event:2");
  write(version);
  go_back_to(first_step);
}

void TensorboardWriter::open(FileSystem& files, const std::string& run) {
  const std::string folder = join_path(run, "tensorboard");
  files.make_folders(folder);
  const std::string name =
      concat(kPrefix, seconds_for_name(folder), ".", host_name(), ".", getpid(), ".0");
  file_.emplace(files, join_path(folder, name), "tensorboard");
}

void TensorboardWriter::go_back_to(int64_t step) {
  TensorboardEvent event;
  event.set_step(step);
  event.mutable_session_log()->set_status(TensorboardSession::START);
  write(event);
}

void TensorboardWriter::record(const StepRecord& record) {
  int at = 0;
  for (const Scalar& scalar : kOfStep)
    step_.mutable_summary()->mutable_value(at++)->set_simple_value(float(scalar.value(record)));
  step_.set_step(record.step);
  write(step_);
  const auto put = [&](TensorboardEvent& event, const std::optional<double>& value) {
    if (!value) return;
    event.set_step(record.step);
    event.mutable_summary()->mutable_value(0)->set_simple_value(float(*value));
    write(event);
  };
  put(held_out_loss_, record.val_loss);
  put(held_out_bits_, record.val_bpb);
}

void TensorboardWriter::write(TensorboardEvent& event) {
  if (!file_) return;
  event.set_wall_time(wall_seconds());
  const uint64_t length = event.ByteSizeLong();
  check(length + kTensorboardFrame <= buffer_.size(), "an event of ", length,
        " bytes, expected at ", "most ", buffer_.size() - kTensorboardFrame);
  char* at = buffer_.data();
  const auto put = [&](const auto& value) {  // little-endian, as our machines are
    std::memcpy(at, &value, sizeof value);
    at += sizeof value;
  };
  put(length);
  put(masked_crc32c({buffer_.data(), sizeof length}));
  event.SerializeWithCachedSizesToArray(reinterpret_cast<uint8_t*>(at));
  const std::string_view data(at, length);
  at += length;
  put(masked_crc32c(data));
  file_->add(buffer_.data(), length + kTensorboardFrame);
}

}  // namespace moemamba
