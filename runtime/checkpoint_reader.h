#pragma once
#include <functional>
#include <optional>

#include "runtime/checkpoint_folder.h"
#include "runtime/checkpoint_pieces.h"
#include "runtime/manifest.h"

namespace moemamba {

// A checkpoint on disk whose manifest holds.
class Checkpoint {
 public:
  explicit Checkpoint(const std::string& path);  // throws an Error that names what is wrong
  const std::string& path() const { return path_; }
  const Manifest& manifest() const { return manifest_; }
  std::optional<Manifest::Tensor> find(const std::string& tensor) const;

  // Re-reads files first, first + stride, .. of the manifest's list, or those: sizes and digests.
  // An Error names the file, or one of them. `sharing`: ranks that do so at once on this machine.
  void verify_files(int first = 0, int stride = 1, int sharing = 1) const;
  void verify_files(const std::vector<int>& indices, int threads) const;
  // Every difference between its tensors and what the model of `store` has; "" where there is none.
  std::string differences(const ParameterStore& store) const;
  // Reads elements [begin, end) of one tensor's values or moments.
  void read(const StatePiece& piece) const;
  // All values that this rank holds and the moments that it owns. Never more memory than that and
  // one piece's bookkeeping.
  void load(const ParameterStore& store) const;

 private:
  std::string path_;
  Manifest manifest_;
};

struct LoadRequest {
  std::string run;
  int64_t generation = 0;                       // of the lease; names damaged ones
  std::function<void(const std::string&)> say;  // rank 0: what was found, for people
  std::string_view heading = "resumed    ";     // how the line of the one that was loaded begins
  std::function<bool()> may_write = {};  // rank 0: the lease is still ours; empty: always
};

// The newest checkpoint of the run that holds in every file, loaded by all ranks: any layout reads
// any layout's. Returns what its manifest says, without files and tensors. Damaged ones are named
// and, once a good one is found, renamed. None there: nothing. Some there and none good, or the
// newest whole one of another model or of a format that this program does not read: an Error, and
// nothing is touched. Nor is it where one cannot be read for a reason that is not its own:
// Unavailable.
std::optional<CheckpointManifest> load_newest(FileSystem& files, ProcessGroups& groups,
                                              Stream& stream, const ParameterStore& store,
                                              const LoadRequest& request);

}  // namespace moemamba
