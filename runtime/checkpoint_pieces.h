#pragma once
#include <string>
#include <vector>

#include "model/parameters.h"

namespace moemamba {

enum class StateKind : uint8_t { value, exp_avg, exp_avg_sq };
constexpr const char* kStateNames[] = {"value", "exp_avg", "exp_avg_sq"};

// Elements [begin, end) of one global tensor, or of its moments, and where this rank has them.
struct StatePiece {
  std::string tensor;
  Shape shape;  // of the whole tensor
  StateKind kind = StateKind::value;
  int64_t begin = 0, end = 0;
  float* data = nullptr;
};

// Every tensor of which this rank holds all values: dense ones, states, its own experts.
std::vector<StatePiece> held_values(const ParameterStore& store);
// Moments of the slices that this rank owns (ZeRO-1); a slice may begin within a tensor's row.
std::vector<StatePiece> owned_moments(const ParameterStore& store);
// The values of those same slices, and on the first rank the states: over all ranks every element
// once.
std::vector<StatePiece> owned_values(const ParameterStore& store);
// What this rank writes: its share of the tensors whose values several ranks hold (whole tensors,
// shared out evenly by bytes), and its moments. Over all ranks every element once.
std::vector<StatePiece> written_pieces(const ParameterStore& store);

}  // namespace moemamba
