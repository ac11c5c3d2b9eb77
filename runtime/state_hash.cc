#include "runtime/state_hash.h"

#include <bit>
#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "core/error.h"
#include "kernels/state_hash.h"

namespace moemamba {

namespace {

uint64_t name_hash(const StatePiece& piece) {
  uint64_t hash = 0xcbf29ce484222325u + uint64_t(piece.kind);
  for (char c : piece.tensor) hash = (hash ^ uint8_t(c)) * 0x100000001b3u;
  hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9u;
  hash = (hash ^ (hash >> 27)) * 0x94d049bb133111ebu;
  return hash ^ (hash >> 31);
}

// sum [1] i64, where the pieces and the stream are.
void add_hashes(Stream& stream, const std::vector<StatePiece>& pieces, const Tensor& sum) {
  for (const StatePiece& piece : pieces)
    run(stream, StateHash{.x = view(piece.data, {piece.end - piece.begin}, DType::f32, sum.device),
                          .sum = sum,
                          .key = name_hash(piece) + uint64_t(piece.begin) * kHashStride});
}

}  // namespace

void HashChain::add(const Link& link) {
  const auto bits = [](double value) {
    return std::bit_cast<uint64_t>(std::isnan(value) ? std::numeric_limits<double>::quiet_NaN()
                                                     : value);
  };
  digest_.add(text_.data(), text_.size() - 1);
  const uint64_t words[] = {uint64_t(link.step), bits(link.loss), bits(link.grad_norm),
                            uint64_t(link.first_sample), uint64_t(link.samples)};
  digest_.add(words, sizeof words);
  digest_.hex(text_.data());
}

void HashChain::resume(const std::string& text) {
  check(text.size() == text_.size() - 1, "a hash chain has 64 digits, found \"", text, "\"");
  std::copy(text.begin(), text.end(), text_.begin());
}

uint64_t state_hash_of(const std::vector<StatePiece>& pieces) {
  Stream stream = Stream::immediate();
  uint64_t sum = 0;
  add_hashes(stream, pieces, view(&sum, {1}, DType::i64));
  return sum;
}

StateHasher::StateHasher(ProcessGroups& groups, const ParameterStore& store)
    : groups_(groups),
      values_(owned_values(store)),
      moments_(owned_moments(store)),
      of_ranks_(size_t(groups.layout.ranks())),
      sum_(groups.device, sizeof(uint64_t)),
      host_(Stream::immediate()) {}

uint64_t StateHasher::take(Stream& compute) {
  const InPhase in_phase(groups_.activity, Phase::hashing);
  const Tensor sum = view(sum_, 0, {1}, DType::i64);
  fill_zero(compute, sum);
  add_hashes(compute, values_, sum);
  add_hashes(compute, moments_, sum);
  uint64_t own = 0;
  copy(compute, sum, view(&own, {1}, DType::i64));
  compute.synchronize();
  groups_.control->all_gather(host_, &own, of_ranks_.data(), sizeof own);
  uint64_t all = 0;
  for (uint64_t part : of_ranks_) all += part;
  return all;
}

uint64_t state_hash(ProcessGroups& groups, Stream& compute, const ParameterStore& store) {
  return StateHasher(groups, store).take(compute);
}

std::string state_hash_text(uint64_t hash) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(hash));
  return text;
}

}  // namespace moemamba
