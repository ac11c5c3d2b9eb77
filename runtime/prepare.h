#pragma once
#include <string>
#include <vector>

#include "core/file.h"
#include "runtime/token_files.h"
#include "runtime/tokenizer.h"

namespace moemamba {

// Text to token files. Inputs: .txt (one document), .jsonl (one {"text": ...} a line, named by
// "name", "title" or "id" where given), .rdb (an R data base of character vectors, as of Debian's
// r-cran-janeaustenr; a document is named by its first line), or folders of these.
struct PrepareRequest {
  std::vector<std::string> inputs;
  std::vector<std::string> validation_inputs;  // held out as a whole
  std::vector<std::string> hold_out;  // names (letter case does not count) or numbers from 1
  double held_out_fraction = 0;  // documents evenly spread; the end of each where there are too few
  std::string output;            // folder
  TokenizerKind tokenizer = TokenizerKind::bpe;
  int vocabulary = 4096;       // bpe only
  std::string tokenizer_file;  // use this one instead of making one
  TokenFormat format = TokenFormat::megatron;
  bool overwrite = false;  // replace what an earlier prepare left in `output`
};

struct SplitSummary {
  int64_t documents = 0;
  int64_t bytes = 0;
  int64_t tokens = 0;  // with one end-of-document id a document
  double bytes_per_token() const { return tokens ? double(bytes) / double(tokens) : 0; }
};

// summary.json of a prepared folder.
struct PrepareSummary {
  SplitSummary train;
  SplitSummary validation;  // zero where nothing is held out
  int64_t vocabulary = 0;
  int32_t end_of_document = -1;
  std::string tokenizer;         // description
  std::string tokenizer_digest;  // sha256 of the tokenizer file
};

// Writes output/{tokenizer.model, train.*, validation.*, validation.txt, summary.json}. The folder
// appears whole or not at all.
PrepareSummary prepare(FileSystem& files, const PrepareRequest& request);

PrepareSummary read_summary(const std::string& folder);

// Names inside a prepared folder. Token files are given without .bin.
std::string tokenizer_path(const std::string& folder);
std::string train_path(const std::string& folder);
std::string validation_path(const std::string& folder);
std::string validation_text_path(const std::string& folder);

}  // namespace moemamba
