#include "core/arena.h"

#include <algorithm>
#include <cstdint>

namespace moemamba {

namespace {
// Of the pattern that is copied to where memory is poisoned.
constexpr int64_t kPiece = 1 << 14;

// `bytes` at `data`, for copies.
Tensor bytes_at(std::byte* data, int64_t bytes, DeviceKind device) {
  return view(data, {bytes}, DType::u8, device);
}
}  // namespace

// Tensor number n (from below) with `used` bytes before it begins n + 1 red zones in front and n
// behind further than in an arena without guards: all borders of 64 bytes stay.
struct Arena::Guards {
  struct Out {
    const char* who;
    std::byte* data;
    int64_t before, bytes;  // used() when it was taken
  };
  Stream* stream;
  size_t tensors;
  std::vector<Out> out;
  std::vector<uint32_t> pattern = std::vector<uint32_t>(kPiece / 4, kPoison);
  std::string broken;

  void poison(std::byte* data, int64_t bytes, DeviceKind device) {
    auto* from = reinterpret_cast<std::byte*>(pattern.data());
    for (int64_t done = 0; done < bytes; done += kPiece) {
      const int64_t piece = std::min(kPiece, bytes - done);
      copy(*stream, bytes_at(from, piece, DeviceKind::cpu), bytes_at(data + done, piece, device));
    }
  }
  // Appends a red zone to `zones`, where it is when the stream has come so far.
  void fetch(std::byte* zone, std::byte* to, DeviceKind device) {
    copy(*stream, bytes_at(zone, kRedZone, device), bytes_at(to, kRedZone, DeviceKind::cpu));
  }
  void look(const Out& out, const std::byte* zones) {
    const auto* poison = reinterpret_cast<const std::byte*>(pattern.data());
    for (int64_t i = 0; i < 2 * kRedZone && broken.empty(); ++i)
      if (zones[i] != poison[i])
        broken = concat(out.who, " (", out.bytes, " bytes): written ",
                        i < kRedZone ? kRedZone - i : i - kRedZone + 1, " bytes ",
                        i < kRedZone ? "before its begin" : "past its end");
  }
};

void Arena::guard(Stream& stream, int64_t tensors) {
  check(used_ == 0 && !measures(), name_, " arena: guarded while ", used_, " bytes are out");
  stream.synchronize();
  buffer_ = Buffer(device_, capacity_ + 2 * kRedZone * tensors);
  guards_ = std::make_shared<Guards>();
  guards_->stream = &stream;
  guards_->tensors = size_t(tensors);
}

std::byte* Arena::guarded_place(int64_t bytes, const char* who) {
  Guards& guards = *guards_;
  check(guards.out.size() < guards.tensors, name_, " arena: guards for ", guards.tensors,
        " tensors at a time are too few");
  std::byte* zone = buffer_.data() + used_ + 2 * kRedZone * int64_t(guards.out.size());
  guards.poison(zone, bytes + 2 * kRedZone, device_);
  guards.out.push_back({who, zone + kRedZone, used_, bytes});
  return guards.out.back().data;
}

// All that goes at once is looked at behind one wait. Runs at the end of scopes: throws nothing.
void Arena::check_guards(int64_t used) {
  Guards& guards = *guards_;
  const auto goes = [&](const Guards::Out& out) {  // a tensor of no bytes goes early
    return out.before + out.bytes > used || (out.bytes == 0 && out.before >= used);
  };
  size_t first = guards.out.size();
  while (first > 0 && goes(guards.out[first - 1])) --first;
  const size_t count = guards.out.size() - first;
  if (count == 0) return;
  try {
    std::vector<std::byte> zones(count * 2 * kRedZone);
    for (size_t i = 0; i < count; ++i) {
      const Guards::Out& out = guards.out[first + i];
      std::byte* to = zones.data() + i * 2 * kRedZone;
      guards.fetch(out.data - kRedZone, to, device_);
      guards.fetch(out.data + out.bytes, to + kRedZone, device_);
    }
    guards.stream->synchronize();
    for (size_t i = 0; i < count; ++i)
      guards.look(guards.out[first + i], zones.data() + i * 2 * kRedZone);
  } catch (const std::exception& error) {
    if (guards.broken.empty()) guards.broken = error.what();
  }
  guards.out.resize(first);
}

std::string Arena::broken_guard() {
  check(guards_ != nullptr, name_, " arena: has no guards");
  give_back(0);
  return guards_->broken;
}

}  // namespace moemamba
