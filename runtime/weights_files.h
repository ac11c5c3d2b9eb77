#pragma once
#include <string>
#include <vector>

#include "runtime/safetensors.h"

namespace moemamba {

// The files of `path`: a folder of weights or one file (find_weights, of a run); never none. Files
// that the user names, and model.safetensors in such a folder, may be symlinks; those that an index
// names must be files of its own folder, or an Error says which is not.
std::vector<SafetensorsReader> open_weights(const std::string& path);

// The same for the index of a folder: model.safetensors.index.json, as Hugging Face tools write it.
std::vector<SafetensorsReader> open_index(const std::string& folder);

// Where the weights before wait until new ones have replaced them (save_weights).
std::string old_weights(const std::string& folder);
// `folder`, or where its weights are if a crash between the two renames of save_weights left them
// under their old name.
std::string whole_weights(const std::string& folder);

}  // namespace moemamba
