#pragma once
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/line_file.h"
#include "runtime/metrics.h"
#include "runtime/tensorboard_event.pb.h"

namespace moemamba {

// The steps' records for TensorBoard: <run>/tensorboard/events.out.tfevents.SECONDS.HOST.PID.0, one
// file a launch (docs/files.md). A disk that refuses costs records and one sentence on stderr,
// never the training; so does one on which the file cannot be made. Allocates nothing after the
// first step while the disk accepts.
class TensorboardWriter {
 public:
  // first_step: the launch begins with it; what older files say of it and later ones is void.
  TensorboardWriter(FileSystem& files, const std::string& run, int64_t first_step);
  void record(const StepRecord& record);
  void go_back_to(int64_t step);  // steps from there on are taken again
  int64_t lost_records() const { return file_ ? file_->lost_lines() : 0; }

 private:
  void open(FileSystem& files, const std::string& run);
  void write(TensorboardEvent& event);
  std::optional<LineFile> file_;                           // none: it could not be made
  TensorboardEvent step_, held_out_loss_, held_out_bits_;  // filled anew for each record
  std::vector<char> buffer_;
};

// As TensorFlow frames a record: its length (u64) and that length's checksum, the data and the
// data's. All little-endian; a checksum is CRC-32C, turned by 15 bits, plus 0xa282ead8.
constexpr size_t kTensorboardFrame = 16;  // bytes around the data
uint32_t masked_crc32c(std::string_view data);

}  // namespace moemamba
