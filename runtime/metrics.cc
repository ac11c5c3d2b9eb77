#include "runtime/metrics.h"

#include <cmath>
#include <cstdarg>
#include <cstdio>

#include "core/error.h"

namespace moemamba {
namespace {

// printf into a buffer of fixed size; what does not fit is an Error, not a cut line.
class Line {
 public:
  Line(char* buffer, size_t size) : buffer_(buffer), size_(size) {}

  __attribute__((format(printf, 2, 3))) void put(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    const int length = std::vsnprintf(buffer_ + used_, size_ - used_, format, arguments);
    va_end(arguments);
    check(length >= 0 && used_ + size_t(length) < size_, "a line of metrics exceeds ", size_,
          " bytes");
    used_ += size_t(length);
  }
  // JSON has no word for what is not finite. Nine digits give an f32 back exactly.
  void number(const char* name, double value) {
    if (std::isfinite(value)) {
      put(",\"%s\":%.9g", name, value);
    } else {
      put(",\"%s\":null", name);
    }
  }
  size_t used() const { return used_; }

 private:
  char* buffer_;
  size_t size_;
  size_t used_ = 0;
};

void put_seconds(Line& line, const StepSeconds& seconds) {
  const auto finite = [](double value) { return std::isfinite(value) ? value : 0.0; };
  line.put(",\"seconds\":{\"data\":%.6g,\"forward\":%.6g,\"backward\":%.6g", finite(seconds.data),
           finite(seconds.forward), finite(seconds.backward));
  line.put(",\"exchange\":%.6g,\"reduction\":%.6g,\"optimizer\":%.6g", finite(seconds.exchange),
           finite(seconds.reduction), finite(seconds.optimizer));
  line.put(",\"all\":%.6g}", finite(seconds.all));
}

}  // namespace

size_t format_metrics(const StepRecord& record, char* buffer, size_t size) {
  Line line(buffer, size);
  line.put("{\"step\":%lld", static_cast<long long>(record.step));
  line.number("loss", record.loss);
  line.number("ce", record.ce);
  line.number("balance_loss", record.balance_loss);
  line.number("z_loss", record.z_loss);
  line.number("grad_norm", record.grad_norm);
  line.number("lr", record.lr);
  line.number("tokens_per_second", record.tokens_per_second);
  line.number("load_max_over_mean", record.load_max_over_mean);
  line.put(",\"dead_experts\":%lld,\"dropped_rows\":%lld",
           static_cast<long long>(record.dead_experts),
           static_cast<long long>(record.dropped_rows));
  put_seconds(line, record.seconds);
  if (record.val_loss) line.number("val_loss", *record.val_loss);
  if (record.val_bpb) line.number("val_bpb", *record.val_bpb);
  if (record.chain[0]) line.put(",\"chain\":\"%s\"", record.chain.data());
  if (record.state_hash)
    line.put(",\"state_hash\":\"%016llx\"", static_cast<unsigned long long>(*record.state_hash));
  if (record.failed_saves != 0)
    line.put(",\"failed_saves\":%lld", static_cast<long long>(record.failed_saves));
  if (record.replays != 0) line.put(",\"replays\":%lld", static_cast<long long>(record.replays));
  if (record.skipped) line.put(",\"skipped\":true");
  line.put("}");
  return line.used();
}

MetricsWriter::MetricsWriter(FileSystem& files, const std::string& path)
    : lines_(files, path, "metrics") {}

void MetricsWriter::record(const StepRecord& record) {
  char line[kMetricsLine + 1];
  size_t length = format_metrics(record, line, kMetricsLine);
  line[length++] = '\n';
  lines_.add(line, length);
}

}  // namespace moemamba
