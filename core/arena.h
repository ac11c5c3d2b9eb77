#pragma once
#include <limits>
#include <memory>
#include <vector>

#include "core/device.h"

namespace moemamba {

// Owns one block of zeroed memory, 64-byte aligned.
class Buffer {
 public:
  Buffer() = default;
  Buffer(DeviceKind device, int64_t bytes);
  // Of the host, for copies from and to `device`: pinned where that is a GPU.
  static Buffer staging(DeviceKind device, int64_t bytes);
  // An address without memory, for plans: nothing may read or write there.
  static Buffer planned(int64_t bytes);
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  ~Buffer();
  std::byte* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  DeviceKind device() const { return kind_ == Kind::cuda ? DeviceKind::cuda : DeviceKind::cpu; }

 private:
  enum class Kind : uint8_t { host, planned, cuda, pinned };
  std::byte* data_ = nullptr;
  int64_t bytes_ = 0;
  Kind kind_ = Kind::host;
};

// A dense view into a buffer, `offset` bytes behind its begin.
Tensor view(const Buffer& buffer, int64_t offset, Shape shape, DType dtype);

// Hands out views of one allocation, made before step one. Rows of a tensor with more than one row
// are padded to 16 bytes, tensors start on 64-byte borders. Full: an Error that names who asked
// and for how much.
class Arena {
 public:
  Arena(std::string name, DeviceKind device, int64_t bytes);
  // Only counts: its tensors have addresses but no memory. For dry streams.
  static Arena measure(std::string name, DeviceKind device = DeviceKind::cpu);
  // What a measuring arena gave out: to whom (a literal) and how much, padding included.
  struct Taken {
    const char* who;
    int64_t bytes;
  };

  Tensor take(Shape shape, DType dtype = DType::f32, const char* who = "tensor");
  int64_t used() const { return used_; }
  int64_t peak() const { return peak_; }
  int64_t capacity() const { return capacity_; }
  bool measures() const { return buffer_.data() == nullptr; }
  void reset_peak() { peak_ = used_; }
  void give_back(int64_t used);
  // All that was out when the arena was fullest, in order. REQUIRES: measures().
  const std::vector<Taken>& at_peak();

  // For tests: from here on what is handed out is full of NaN (and of 32-bit numbers that are no
  // index), and stands between two red zones of kRedZone bytes of the same, in memory that grows by
  // what these take for `tensors` at a time. All that is counted stays as planned. `stream` is the
  // one whose work uses the arena; the host waits for it whenever memory is given back.
  // REQUIRES: nothing is out, and the arena has memory.
  static constexpr int64_t kRedZone = 256;
  static constexpr uint32_t kPoison = 0x7fffffffu;  // as f32 a NaN, as bf16 two of them
  void guard(Stream& stream, int64_t tensors);
  // Of a guarded arena: who was the first whose red zones somebody wrote to; "" where nobody did.
  std::string broken_guard();

 private:
  struct Guards;
  std::byte* guarded_place(int64_t bytes, const char* who);
  void check_guards(int64_t used);
  Arena() = default;
  void remember_peak();
  std::string name_;
  Buffer buffer_;
  DeviceKind device_ = DeviceKind::cpu;
  int64_t capacity_ = 0;
  int64_t used_ = 0;
  int64_t peak_ = 0;
  std::vector<Taken> out_, at_peak_;  // of a measuring arena
  size_t alike_ = 0;                  // first entries of out_ that at_peak_ has as well
  std::shared_ptr<Guards> guards_;    // of a guarded arena
};

// Gives back, when it ends, all that was taken since it began.
class Frame {
 public:
  explicit Frame(Arena& arena) : arena_(arena), used_(arena.used()) {}
  ~Frame() { arena_.give_back(used_); }
  Frame(const Frame&) = delete;
  Frame& operator=(const Frame&) = delete;

 private:
  Arena& arena_;
  int64_t used_;
};

}  // namespace moemamba
