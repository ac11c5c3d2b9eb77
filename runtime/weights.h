#pragma once
#include <map>
#include <string>

#include "core/file.h"
#include "model/parameters.h"

namespace moemamba {

// Weights on disk: <folder>/model.safetensors, or model-0000i-of-0000n.safetensors and
// model.safetensors.index.json where the experts are on several ranks; f32, one tensor per expert
// under global names. Every rank calls both; any layout reads what any layout wrote.

// The folder appears whole; one that is there is replaced; a failure leaves nothing half-written.
// `metadata`, and the step, are kept in the files' headers. Values must be complete on every rank
// (Trainer::wait_weights).
using WeightsMetadata = std::map<std::string, std::string>;
void save_weights(FileSystem& files, const std::string& folder, const ParameterStore& store,
                  ProcessGroups& groups, Stream& stream, WeightsMetadata metadata, int64_t step);

// What `path` stands for. Of a run's folder that is the newest of its weights/ and its checkpoints
// (whose manifests and sizes hold: others are passed over), by their step: a run that was stopped,
// went on and was killed has checkpoints newer than the weights of its stop.
struct FoundWeights {
  std::string path;   // a folder of weights, a checkpoint, or a file
  int64_t step = -1;  // -1: not known
};
FoundWeights find_weights(const std::string& path);
std::string describe(const FoundWeights& found);  // for people
// For use: every byte of a checkpoint is read against its digest before, and one that does not hold
// is passed over like the others, or, where `path` is its own folder, an Error. Weights that were
// exported have no digests. The same on all ranks, though the run may be saving meanwhile: rank 0
// looks for the place, and all ranks read, each its share of the files.
FoundWeights find_weights(const std::string& path, ProcessGroups& groups, Stream& stream);

// path: such a folder, a run's folder, or one .safetensors file. Names that are missing, left over
// or of another shape are all listed in one Error before anything is read.
void load_weights(const std::string& path, const ParameterStore& store,
                  const ProcessGroups& groups);
WeightsMetadata read_weights_metadata(const std::string& path);

}  // namespace moemamba
