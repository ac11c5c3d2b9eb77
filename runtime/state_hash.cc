#include "runtime/state_hash.h"

#include <bit>
#include <cstdio>
#include <vector>

#include "core/error.h"

namespace moemamba {

namespace {

uint64_t mixed(uint64_t x) {  // the finalizer of splitmix64: every bit moves every other
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

uint64_t name_hash(const StatePiece& piece) {
  uint64_t hash = 0xcbf29ce484222325u + uint64_t(piece.kind);
  for (char c : piece.tensor) hash = (hash ^ uint8_t(c)) * 0x100000001b3u;
  return mixed(hash);
}

uint64_t hash_of(const StatePiece& piece) {
  const uint64_t key = name_hash(piece);
  uint64_t sum = 0;
  for (int64_t i = piece.begin; i < piece.end; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(piece.data[i - piece.begin]);
    sum += mixed(key + uint64_t(i) * 0x9e3779b97f4a7c15u + mixed(bits + 1));
  }
  return sum;
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
