#pragma once
#include <array>
#include <cmath>
#include <cstdint>
#include <string_view>

namespace moemamba {

// Counter-based random numbers: f(seed, purpose, index), the same on every device and for any
// sharding; nothing to save. Philox4x32-10 (Salmon et al., SC'11).
class Random {
 public:
  Random(uint64_t seed, std::string_view purpose) {
    uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a
    for (char c : purpose) hash = (hash ^ uint8_t(c)) * 0x100000001b3u;
    key_ = {uint32_t(seed), uint32_t(seed >> 32)};
    purpose_ = {uint32_t(hash), uint32_t(hash >> 32)};
  }

  std::array<uint32_t, 4> bits(uint64_t index) const {
    std::array<uint32_t, 4> x{uint32_t(index), uint32_t(index >> 32), purpose_[0], purpose_[1]};
    uint32_t k0 = key_[0], k1 = key_[1];
    for (int round = 0; round < 10; ++round) {
      const uint64_t a = uint64_t{0xD2511F53u} * x[0], b = uint64_t{0xCD9E8D57u} * x[2];
      x = {uint32_t(b >> 32) ^ x[1] ^ k0, uint32_t(b), uint32_t(a >> 32) ^ x[3] ^ k1, uint32_t(a)};
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return x;
  }

  // In (0, 1); 53 bits.
  double uniform(uint64_t index) const {
    const auto x = bits(index);
    const uint64_t wide = (uint64_t(x[0]) << 32 | x[1]) >> 11;
    return (double(wide) + 0.5) * 0x1p-53;
  }
  // Standard normal (Box-Muller).
  double normal(uint64_t index) const {
    const auto x = bits(index);
    const double u = (double((uint64_t(x[0]) << 32 | x[1]) >> 11) + 0.5) * 0x1p-53;
    const double v = (double((uint64_t(x[2]) << 32 | x[3]) >> 11) + 0.5) * 0x1p-53;
    return std::sqrt(-2.0 * std::log(u)) * std::cos(6.283185307179586 * v);
  }
  // Uniform over 0 .. below - 1. Bias below 2^-40 for below < 2^24.
  uint64_t integer(uint64_t index, uint64_t below) const {
    const auto x = bits(index);
    const uint64_t wide = uint64_t(x[0]) << 32 | x[1];
    return uint64_t((static_cast<unsigned __int128>(wide) * below) >> 64);
  }

 private:
  std::array<uint32_t, 2> key_{}, purpose_{};
};

}  // namespace moemamba
