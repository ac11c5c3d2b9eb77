#pragma once
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

// A small file of a checkpoint, the same way.
void write_small_file(FileSystem& files, const std::string& folder, const std::string& name,
                      std::string_view content, ShardReport& report);

}  // namespace moemamba
