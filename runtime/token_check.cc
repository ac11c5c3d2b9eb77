#include "runtime/token_check.h"

#include <algorithm>
#include <filesystem>
#include <optional>

#include "core/error.h"
#include "runtime/prepare.h"
#include "runtime/token_files.h"

namespace moemamba {

namespace {

constexpr int64_t kFirstIds = int64_t{1} << 22;  // of each file; 10 ms

// The part of a prepared folder that the file is, where summary.json tells of one.
struct Prepared {
  std::string folder, name;
  PrepareSummary summary;
};

std::optional<Prepared> find_prepared(const TokenFile& file) {
  const std::string folder = folder_of(file.path());
  const std::string name = std::filesystem::path(file.path()).stem().string();
  if (name != "train" && name != "validation") return {};
  if (!file_exists(join_path(folder, "summary.json"))) return {};
  return Prepared{folder, name, read_summary(folder)};
}

void check_whole(const TokenFile& file, const Prepared& prepared) {
  const bool trains = prepared.name == "train";
  const int64_t tokens = (trains ? prepared.summary.train : prepared.summary.validation).tokens;
  check(file.format() != TokenFormat::raw_u16, join_path(prepared.folder, prepared.name),
        ".idx: ", "missing; `moemamba prepare` wrote it beside ", file.path(),
        ": bring both, or prepare the ", "text again");
  check(file.size() == tokens, file.path(), ": expected the ", tokens, " tokens of ",
        join_path(prepared.folder, "summary.json"), ", found ", file.size(),
        ": the file is cut off or another one; prepare the text again");
}

void check_maker(const TokenFile& file, const Prepared& prepared, const Tokenizer& tokenizer) {
  const std::string& folder = prepared.folder;
  const PrepareSummary& made = prepared.summary;
  check(made.tokenizer_digest == tokenizer.digest(), file.path(), ": was made with the tokenizer ",
        tokenizer_path(folder), " (", made.tokenizer, "), data.tokenizer is another (",
        tokenizer.description(), "); give --data.tokenizer=", tokenizer_path(folder));
}

void check_first_ids(const TokenFile& file, int64_t vocabulary) {
  std::vector<int32_t> ids(1 << 14);
  const int64_t end = std::min(file.size(), kFirstIds);
  for (int64_t first = 0; first < end; first += int64_t(ids.size())) {
    const int64_t count = std::min<int64_t>(int64_t(ids.size()), end - first);
    file.read(first, count, ids.data());
    for (int64_t i = 0; i < count; ++i)
      check(ids[size_t(i)] >= 0 && ids[size_t(i)] < vocabulary, file.place(first + i),
            ": token id ", ids[size_t(i)], " is outside the vocabulary of ", vocabulary,
            "; the file was made with another tokenizer or is damaged");
  }
}

}  // namespace

void check_token_files(const std::string& setting, const std::vector<std::string>& paths,
                       const std::optional<Tokenizer>& tokenizer, int64_t vocabulary) {
  for (const std::string& path : paths) {
    try {
      const TokenFile file(path);
      if (const std::optional<Prepared> prepared = find_prepared(file)) {
        check_whole(file, *prepared);
        if (tokenizer) check_maker(file, *prepared, *tokenizer);
      }
      check_first_ids(file, vocabulary);
    } catch (const Error& error) {
      throw Error(concat("--", setting, "=", path, ": ", error.what(),
                         "; expected token files as `moemamba prepare` writes them"));
    }
  }
}

}  // namespace moemamba
