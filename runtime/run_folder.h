#pragma once
#include <string>
#include <string_view>

#include "core/file.h"

namespace moemamba {

// The folder of one run: config.textproto, metrics.jsonl, loss.svg, weights. Called by rank 0.
// A folder that already holds a run is refused; with `overwrite` it is emptied first. A folder
// that holds other things is always refused. Returns the folder.
std::string claim_run_folder(FileSystem& files, const std::string& folder,
                             std::string_view config_text, bool overwrite);

}  // namespace moemamba
