#pragma once
#include <array>
#include <string>

#include "core/file.h"
#include "runtime/checkpoint_pieces.h"

namespace moemamba {

// What a run was, step by step: H_k = SHA-256(H_{k-1}, step, loss bits, bits of the gradient's
// norm, first and last sample). Two runs with the same value had the same losses all along.
// What is not a number has one pattern of bits here, whatever made it.
class HashChain {
 public:
  struct Link {
    int64_t step;
    double loss, grad_norm;
    int64_t first_sample, samples;
  };
  using Text = std::array<char, 65>;  // 64 hex digits and a zero
  HashChain() { text_.fill('0'), text_.back() = 0; }
  void add(const Link& link);
  const Text& text() const { return text_; }
  void resume(const std::string& text);  // 64 hex digits

 private:
  Sha256 digest_;
  Text text_;
};

// A sum over all elements of values and moments of mixed (bits, tensor, index): it depends neither
// on the order nor on who holds what. Allocates in its constructor only.
class StateHasher {
 public:
  // REQUIRES: a store that lives on where it is.
  StateHasher(ProcessGroups& groups, const ParameterStore& store);
  // Behind the work of `compute`, for which the host waits. Every rank calls it and gets the same.
  uint64_t take(Stream& compute);

 private:
  ProcessGroups& groups_;
  std::vector<StatePiece> values_, moments_;
  std::vector<uint64_t> of_ranks_;
  Buffer sum_;
  Stream host_;
};
uint64_t state_hash(ProcessGroups& groups, Stream& compute, const ParameterStore& store);  // once
// This rank's share of the sum, of pieces in the host's memory.
uint64_t state_hash_of(const std::vector<StatePiece>& pieces);
std::string state_hash_text(uint64_t hash);  // 16 hex digits

}  // namespace moemamba
