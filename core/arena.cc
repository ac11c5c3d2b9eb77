#include "core/arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "core/gpu.h"

namespace moemamba {

namespace {
constexpr int64_t kAlignment = 64;
constexpr int64_t kRowAlignment = 16;
constexpr int64_t kHugePage = int64_t{2} << 20;
int64_t round_up(int64_t value, int64_t to) {
  return (value + to - 1) / to * to;
}
// Zeroed. huge: of huge pages where the system has such; a disk that takes it itself looks up each
// page of every write.
std::byte* host_memory(int64_t bytes, bool huge) {
  const int64_t alignment = huge && bytes >= kHugePage ? kHugePage : kAlignment;
  const int64_t whole = round_up(bytes, alignment);
  void* memory = std::aligned_alloc(size_t(alignment), size_t(whole));
  check(memory != nullptr, "out of memory: could not allocate ", bytes,
        " bytes; use fewer sequences per micro-batch or more ranks");
  if (alignment == kHugePage) ::madvise(memory, size_t(whole), MADV_HUGEPAGE);
  std::memset(memory, 0, size_t(bytes));
  return static_cast<std::byte*>(memory);
}
}  // namespace

Buffer::Buffer(DeviceKind device, int64_t bytes) : bytes_(bytes) {
  if (device == DeviceKind::cuda) kind_ = Kind::cuda;
  if (bytes == 0) return;
  if (kind_ == Kind::cuda) {
    data_ = static_cast<std::byte*>(gpu::allocate(bytes));
    gpu::zero_now(data_, bytes);
    return;
  }
  data_ = host_memory(bytes, /*huge=*/false);
}

Buffer Buffer::staging(DeviceKind device, int64_t bytes) {
  Buffer buffer;
  if (bytes == 0) return buffer;
  if (device == DeviceKind::cpu) {
    buffer.data_ = host_memory(bytes, /*huge=*/true);
    buffer.bytes_ = bytes;
    return buffer;
  }
  buffer.kind_ = Kind::pinned;
  buffer.data_ = static_cast<std::byte*>(gpu::allocate_pinned(bytes));
  buffer.bytes_ = bytes;
  std::memset(buffer.data_, 0, size_t(bytes));
  return buffer;
}

Buffer Buffer::planned(int64_t bytes) {
  Buffer buffer;
  // An address that is never read; not null, for that means "not there".
  buffer.data_ = reinterpret_cast<std::byte*>(kAlignment);
  buffer.bytes_ = bytes;
  buffer.kind_ = Kind::planned;
  return buffer;
}

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      kind_(std::exchange(other.kind_, Kind::host)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(kind_, other.kind_);
  return *this;
}

Buffer::~Buffer() {
  if (!data_ || kind_ == Kind::planned) return;
  if (kind_ == Kind::host)
    std::free(data_);
  else if (kind_ == Kind::cuda)
    gpu::release(data_);
  else
    gpu::release_pinned(data_);
}

Tensor view(const Buffer& buffer, int64_t offset, Shape shape, DType dtype) {
  return view(buffer.data() + offset, shape, dtype, buffer.device());
}

Arena::Arena(std::string name, DeviceKind device, int64_t bytes)
    : name_(std::move(name)),
      buffer_(device, std::max<int64_t>(bytes, kAlignment)),
      device_(device),
      capacity_(bytes) {}

Arena Arena::measure(std::string name, DeviceKind device) {
  Arena arena;
  arena.name_ = std::move(name);
  arena.device_ = device;
  arena.capacity_ = int64_t{1} << 60;
  return arena;
}

Tensor Arena::take(Shape shape, DType dtype, const char* who) {
  const int64_t size = size_of(dtype);
  const bool padded = shape.dims > 1 && shape.rows() > 1;
  const int64_t row = padded ? round_up(shape.last() * size, kRowAlignment) : shape.last() * size;
  const int64_t bytes = round_up(row * shape.rows(), kAlignment);
  check(used_ + bytes <= capacity_, name_, " arena is full: ", who, " ", to_string(shape), " ",
        name_of(dtype), " needs ", bytes, " bytes, ", capacity_ - used_, " of ", capacity_,
        " are left");
  // A measuring arena starts at a fake address that is never read.
  std::byte* base = measures() ? reinterpret_cast<std::byte*>(kAlignment) : buffer_.data();
  std::byte* place = guards_ ? guarded_place(bytes, who) : base + used_;
  Tensor tensor{.data = place,
                .shape = shape,
                .stride = row / size,
                .dtype = dtype,
                .device = device_};
  used_ += bytes;
  peak_ = std::max(peak_, used_);
  if (measures() && bytes > 0) out_.push_back({who, bytes});
  return tensor;
}

void Arena::give_back(int64_t used) {
  if (guards_) check_guards(used);
  if (measures()) {
    if (used < used_ && used_ == peak_) remember_peak();
    for (int64_t left = used_; left > used; out_.pop_back()) left -= out_.back().bytes;
    alike_ = std::min(alike_, out_.size());
  }
  used_ = used;
}

// Copies only what has changed since the last time: a peak in every layer stays cheap.
void Arena::remember_peak() {
  at_peak_.resize(alike_);
  at_peak_.insert(at_peak_.end(), out_.begin() + std::ptrdiff_t(alike_), out_.end());
  alike_ = out_.size();
}

const std::vector<Arena::Taken>& Arena::at_peak() {
  check(measures(), name_, " arena: only one that measures knows who held its memory");
  if (used_ == peak_) remember_peak();
  return at_peak_;
}

}  // namespace moemamba
