#pragma once
#include <algorithm>
#include <functional>

#include "core/file.h"
#include "runtime/checkpoint_pieces.h"
#include "runtime/manifest.pb.h"
#include "runtime/safetensors.h"

namespace moemamba {

// One safetensors file of a checkpoint: values under their names and shapes, slices of moments as
// "exp_avg/NAME[BEGIN:END]", one dim.
struct Shard {
  std::string name;
  std::vector<StatePiece> pieces;
  SafetensorsMetadata metadata;
};

// The files that a rank's pieces go into: values, means, means of squares; none without a piece.
std::vector<Shard> shards_of(const std::vector<StatePiece>& pieces, int rank, int ranks,
                             const SafetensorsMetadata& metadata);

// Memory from which a rank's pieces can be written: those of a file one behind the other, where a
// disk may take them itself. The pieces as they lie in it; how much there must be.
int64_t staging_bytes(const std::vector<StatePiece>& pieces);
std::vector<StatePiece> staged_in(std::byte* memory, std::vector<StatePiece> pieces);

struct ShardWriting {
  size_t block_bytes = 64 << 20;  // most of one write; multiples of kDirectBlock
  int digest_threads = 1;  // among which files are shared out, each several at once
};
// Writes shards from the memory of their pieces, as staged_in() has them, which nobody changes
// meanwhile: one file after the other, from this thread; others hash that memory meanwhile. Files
// are new, and synced. Adds them, where their pieces lie and the hash of the state to `report`.
void write_shards(FileSystem& files, const std::string& folder, const std::vector<Shard>& shards,
                  const ShardWriting& how, ShardReport& report);

// The same file where the elements are not in memory: `read` fills `data` of a part of a piece, at
// most kPartElements of them, one behind the other.
using PieceReader = std::function<void(const StatePiece& part)>;
constexpr int64_t kPartElements = 1 << 18;
void write_shard(FileSystem& files, const std::string& folder, const Shard& shard,
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

// A small file of a checkpoint, the same way, but not synced.
std::unique_ptr<OutputFile> write_small_file(FileSystem& files, const std::string& folder,
                                             const std::string& name, std::string_view content,
                                             ShardReport& report);
// Of several, behind the last write: a journal takes them in together, once.
void sync_and_close(std::vector<std::unique_ptr<OutputFile>> files);

}  // namespace moemamba
