#pragma once
#include <algorithm>
#include <functional>

#include "core/file.h"
#include "runtime/checkpoint_pieces.h"
#include "runtime/manifest.pb.h"
#include "runtime/safetensors.h"

namespace moemamba {

// One safetensors file of a checkpoint, written from the memory of `pieces`: values under their
// names and shapes, slices of moments as "exp_avg/NAME[BEGIN:END]", one dim. Digests are taken of
// the memory, before the system gets it; the file is new, and synced. Adds the file and where its
// pieces lie to `report`.
void write_shard(FileSystem& files, const std::string& folder, const std::string& name,
                 const std::vector<StatePiece>& pieces, const SafetensorsMetadata& metadata,
                 ShardReport& report);

// The same file where the elements are not in memory: `read` fills `data` of a part of a piece, at
// most kPartElements of them, one behind the other.
using PieceReader = std::function<void(const StatePiece& part)>;
constexpr int64_t kPartElements = 1 << 18;
void write_shard(FileSystem& files, const std::string& folder, const std::string& name,
                 const std::vector<StatePiece>& pieces, const SafetensorsMetadata& metadata,
                 const PieceReader& read, ShardReport& report);

// How a piece is called in a file.
StoredTensor stored_tensor(const StatePiece& piece);

// Calls act(part) for the parts of a piece of at most kPartElements, in order, each over `buffer`.
template <class Act>
void for_parts(StatePiece piece, std::vector<float>& buffer, Act&& act) {
  const int64_t end = piece.end;
  buffer.resize(size_t(std::min(kPartElements, end - piece.begin)));
  piece.data = buffer.data();
  for (int64_t begin = piece.begin; begin < end; begin = piece.end) {
    piece.begin = begin;
    piece.end = std::min(end, begin + kPartElements);
    act(piece);
  }
}

// A small file of a checkpoint, the same way.
void write_small_file(FileSystem& files, const std::string& folder, const std::string& name,
                      std::string_view content, ShardReport& report);

}  // namespace moemamba
