#pragma once
#include <string>
#include <string_view>

#include "core/file.h"

namespace moemamba {

// The folder of one run: config.textproto, metrics.jsonl, loss.svg, checkpoints, weights, and the
// lease of who works on it. Called by rank 0.

// Whether `folder` already holds a run. One that holds other things is an Error; what an
// overwriting launch has given up, and had no time to delete, is nothing.
bool holds_run(const std::string& folder);

// Makes it the folder of a new run. A run that is there is refused; with `overwrite` it is deleted
// first: one rename ends it as a whole, before that it is as it was. Its lease stays. Returns the
// folder.
std::string claim_run_folder(FileSystem& files, const std::string& folder,
                             std::string_view config_text, bool overwrite);

// "... already holds a run; choose another ...", and why it cannot simply go on.
std::string taken_text(const std::string& folder, const std::string& reason = "");

}  // namespace moemamba
