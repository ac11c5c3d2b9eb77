#include "runtime/checkpoint_pieces.h"

#include <algorithm>

namespace moemamba {

namespace {

// Elements [begin, end) of parameter p with their data, cut into global tensors: an expert
// parameter holds several, one behind the other.
void add_pieces(const ParameterStore& store, const Parameter& p, StateKind kind, int64_t begin,
                int64_t end, float* data, std::vector<StatePiece>& list) {
  if (p.axis == Axis::data) {
    list.push_back({p.name, p.shape, kind, begin, end, data});
    return;
  }
  Shape one;
  for (int d = 1; d < p.shape.dims; ++d) one.extents[one.dims++] = p.shape[d];
  const int64_t size = one.elements();
  for (int64_t at = begin; at < end;) {
    const int64_t expert = at / size, stop = std::min(end, (expert + 1) * size);
    list.push_back({store.expert_name(p, expert), one, kind, at - expert * size,
                    stop - expert * size, data + (at - begin)});
    at = stop;
  }
}

// Of `count` writers, the one that writes what begins at `before` of `total` bytes.
bool writes(int64_t before, int64_t size, int64_t total, int writers, int writer) {
  const int64_t middle = before + size / 2;
  return std::min<int64_t>(writers - 1, middle * writers / std::max<int64_t>(1, total)) == writer;
}

}  // namespace

std::vector<StatePiece> held_values(const ParameterStore& store) {
  std::vector<StatePiece> list;
  for (const Parameter& p : store.parameters())
    add_pieces(store, p, StateKind::value, 0, p.shape.elements(), p.value.as<float>(), list);
  for (const Parameter& state : store.states())
    add_pieces(store, state, StateKind::value, 0, state.shape.elements(), state.value.as<float>(),
               list);
  return list;
}

std::vector<StatePiece> owned_moments(const ParameterStore& store) {
  std::vector<StatePiece> list;
  for (const OwnedSlice& slice : store.owned_slices())
    for (StateKind kind : {StateKind::exp_avg, StateKind::exp_avg_sq}) {
      const Tensor moments = store.moments(slice.parameter->bucket, int(kind) - 1);
      add_pieces(store, *slice.parameter, kind, slice.begin, slice.end,
                 moments.as<float>() + slice.at, list);
    }
  return list;
}

std::vector<StatePiece> owned_values(const ParameterStore& store) {
  std::vector<StatePiece> list;
  for (const OwnedSlice& slice : store.owned_slices())
    add_pieces(store, *slice.parameter, StateKind::value, slice.begin, slice.end,
               slice.parameter->value.as<float>() + slice.begin, list);
  if (store.groups().rank == 0)
    for (const Parameter& state : store.states())
      add_pieces(store, state, StateKind::value, 0, state.shape.elements(), state.value.as<float>(),
                 list);
  return list;
}

std::vector<StatePiece> written_pieces(const ParameterStore& store) {
  const ProcessGroups& groups = store.groups();
  const RankLayout& layout = groups.layout;
  const std::vector<StatePiece> held = held_values(store);
  const auto is_expert = [](const StatePiece& piece) {
    return piece.tensor.find(".experts.") != std::string::npos;
  };
  int64_t total[2] = {}, before[2] = {};
  for (const StatePiece& piece : held) total[is_expert(piece)] += piece.end;
  std::vector<StatePiece> list;
  for (const StatePiece& piece : held) {
    const bool expert = is_expert(piece);
    const int writers = expert ? layout.expert_data_size() : layout.ranks();
    const int own = expert ? layout.expert_data_coordinate(groups.rank) : groups.rank;
    if (writes(before[expert], piece.end, total[expert], writers, own)) list.push_back(piece);
    before[expert] += piece.end;
  }
  const std::vector<StatePiece> moments = owned_moments(store);
  list.insert(list.end(), moments.begin(), moments.end());
  return list;
}

}  // namespace moemamba
