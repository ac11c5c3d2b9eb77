#include "runtime/state_hash.h"

#include <bit>
#include <cstdio>
#include <cstring>
#include <vector>

#include "core/error.h"

namespace moemamba {

namespace {

constexpr uint64_t kStride = 0x9e3779b97f4a7c15u;  // between the keys of neighbours
constexpr int64_t kWide = 8;
using Bits [[gnu::vector_size(4 * kWide)]] = uint32_t;
using Words [[gnu::vector_size(8 * kWide)]] = uint64_t;

// The finalizer of splitmix64: every bit moves every other. Of one word or of several.
template <class Word>
[[gnu::always_inline]] inline void mix(Word& x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  x = x ^ (x >> 31);
}

uint64_t name_hash(const StatePiece& piece) {
  uint64_t hash = 0xcbf29ce484222325u + uint64_t(piece.kind);
  for (char c : piece.tensor) hash = (hash ^ uint8_t(c)) * 0x100000001b3u;
  mix(hash);
  return hash;
}

// Of `count` elements of which the first has the key `key`.
uint64_t sum_one_by_one(const float* data, int64_t count, uint64_t key) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < count; ++i, key += kStride) {
    uint64_t word = std::bit_cast<uint32_t>(data[i]) + 1;
    mix(word);
    word += key;
    mix(word);
    sum += word;
  }
  return sum;
}

// The same number, with four multiplications for eight elements: near the speed of memory, of which
// one by one is a fifth. Only AVX-512 multiplies vectors of 64-bit words; with what AVX2 has in
// its place eight take as long as one by one.
[[gnu::target("avx512f,avx512dq")]] uint64_t sum_wide(const float* data, int64_t count,
                                                      uint64_t key) {
  Words sum{}, keys{};
  for (int64_t lane = 0; lane < kWide; ++lane) keys[lane] = key + uint64_t(lane) * kStride;
  int64_t i = 0;
  for (; i + kWide <= count; i += kWide, keys += kWide * kStride) {
    Bits bits;
    std::memcpy(&bits, data + i, sizeof bits);
    bits += 1;
    Words words = __builtin_convertvector(bits, Words);
    mix(words);
    words += keys;
    mix(words);
    sum += words;
  }
  uint64_t all = sum_one_by_one(data + i, count - i, key + uint64_t(i) * kStride);
  for (int64_t lane = 0; lane < kWide; ++lane) all += sum[lane];
  return all;
}

uint64_t hash_of(const StatePiece& piece) {
  static const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
  return (wide ? sum_wide : sum_one_by_one)(piece.data, piece.end - piece.begin,
                                            name_hash(piece) + uint64_t(piece.begin) * kStride);
}

}  // namespace

void HashChain::add(const Link& link) {
  digest_.add(text_.data(), text_.size() - 1);
  const uint64_t words[] = {uint64_t(link.step), std::bit_cast<uint64_t>(link.loss),
                            std::bit_cast<uint64_t>(link.grad_norm), uint64_t(link.first_sample),
                            uint64_t(link.samples)};
  digest_.add(words, sizeof words);
  digest_.hex(text_.data());
}

void HashChain::resume(const std::string& text) {
  check(text.size() == text_.size() - 1, "a hash chain has 64 digits, found \"", text, "\"");
  std::copy(text.begin(), text.end(), text_.begin());
}

uint64_t state_hash_of(const std::vector<StatePiece>& pieces) {
  uint64_t sum = 0;
  for (const StatePiece& piece : pieces) sum += hash_of(piece);
  return sum;
}

uint64_t state_hash(ProcessGroups& groups, Stream& stream, const ParameterStore& store) {
  uint64_t sum = state_hash_of(owned_values(store)) + state_hash_of(owned_moments(store));
  std::vector<uint64_t> all(size_t(groups.layout.ranks()));
  groups.control->all_gather(stream, &sum, all.data(), sizeof sum);
  stream.synchronize();
  sum = 0;
  for (uint64_t part : all) sum += part;
  return sum;
}

std::string state_hash_text(uint64_t hash) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(hash));
  return text;
}

}  // namespace moemamba
