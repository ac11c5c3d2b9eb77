#pragma once
#include "model/config.h"
#include "runtime/checkpoint_reader.h"

namespace moemamba {

// A checkpoint as ranks of another layout would have written it, to the byte, without such ranks:
// one part of one piece (1 MiB) is in memory at a time. Every byte of the source is verified
// before; what comes out must have its state hash. `output` appears whole or not at all and must
// not exist.
struct ReshardRequest {
  std::string output;  // a folder; where it is called like a checkpoint, of that step
  RankLayout layout;
  ModelSizes sizes;
  std::string config;  // all settings, as of that layout
};
void reshard(FileSystem& files, const Checkpoint& from, const ReshardRequest& request);

// The values alone, as the folder weights/ of a run on one rank: one model.safetensors.
void export_weights(FileSystem& files, const Checkpoint& from, const ReshardRequest& request);

}  // namespace moemamba
