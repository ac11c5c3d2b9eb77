#pragma once
#include <optional>
#include <string>
#include <vector>

#include "runtime/tokenizer.h"

namespace moemamba {

// What can be known of token files before a run begins, so that a mistake costs no run: that they
// can be read and are whole, that no other tokenizer made them (where summary.json, which prepare
// leaves beside them, tells of both) and that their first ids are within the vocabulary. Later ids
// are checked as they are read; without a tokenizer nobody asks who made them. An Error names
// `setting`, the file and what to change.
void check_token_files(const std::string& setting, const std::vector<std::string>& paths,
                       const std::optional<Tokenizer>& tokenizer, int64_t vocabulary);

}  // namespace moemamba
