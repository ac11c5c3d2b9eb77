#include "runtime/state_hash.h"

#include <gtest/gtest.h>

#include <bit>
#include <vector>

namespace moemamba {
namespace {

// docs/checkpoint_format.md, "State hash", word for word.
uint64_t mixed(uint64_t x) {
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

uint64_t defined(const StatePiece& piece) {
  uint64_t key = 0xcbf29ce484222325u + uint64_t(piece.kind);
  for (char b : piece.tensor) key = (key ^ uint8_t(b)) * 0x100000001b3u;
  key = mixed(key);
  uint64_t sum = 0;
  for (int64_t i = piece.begin; i < piece.end; ++i) {
    const auto bits = std::bit_cast<uint32_t>(piece.data[i - piece.begin]);
    sum += mixed(key + uint64_t(i) * 0x9e3779b97f4a7c15u + mixed(uint32_t(bits + 1)));
  }
  return sum;
}

// Bits of every kind of number, NaNs and the largest word (whose successor is 0) among them.
std::vector<float> numbers(int64_t count) {
  std::vector<float> list;
  for (int64_t i = 0; i < count; ++i)
    list.push_back(std::bit_cast<float>(uint32_t(i % 5 == 0 ? ~0u : uint64_t(i) * 2654435761u)));
  return list;
}

TEST(StateHash, IsTheDefinedSumForAnyLengthAndBeginning) {
  for (int64_t count : {0, 1, 7, 8, 9, 16, 31, 1009})
    for (int64_t begin : {0, 3, 1 << 20})
      for (StateKind kind : {StateKind::value, StateKind::exp_avg, StateKind::exp_avg_sq}) {
        std::vector<float> data = numbers(count + 1);
        const StatePiece piece{.tensor = "blocks.0.up",
                               .shape = {begin + count},
                               .kind = kind,
                               .begin = begin,
                               .end = begin + count,
                               .data = data.data() + 1};
        EXPECT_EQ(state_hash_of({piece}), defined(piece)) << count << " from " << begin;
      }
}

TEST(StateHash, OfPartsIsTheSumOfTheirs) {
  std::vector<float> data = numbers(1009);
  StatePiece whole{.tensor = "head", .shape = {1009}, .end = 1009, .data = data.data()};
  StatePiece first = whole, second = whole;
  first.end = second.begin = 501;
  second.data += 501;
  EXPECT_EQ(state_hash_of({second, first}), state_hash_of({whole}));
}

}  // namespace
}  // namespace moemamba
