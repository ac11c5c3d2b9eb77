// Token files: one byte says which, then a .bin; of Megatron's first the length of the .idx in two
// bytes, then the .idx.
#include "runtime/token_files.h"

#include <array>

#include "tests/fuzz/fuzz.h"

namespace moemamba {
namespace {

void read_all(const std::string& path) {
  const TokenFile file(path);
  std::array<int32_t, 1000> ids;
  std::array<uint8_t, 1000> starts;
  constexpr int64_t kMost = int64_t(ids.size());
  for (int64_t at = 0; at < file.size(); at += kMost) {
    const int64_t count = std::min(kMost, file.size() - at);
    file.read(at, count, ids.data());
    file.mark_starts(at, count, 0, starts.data());
  }
  for (int64_t d = 0; d <= file.documents() && file.documents() > 0; ++d)
    require(file.document_begin(d) >= 0 && file.document_begin(d) <= file.size(),
            "documents begin within the file");
}

bool read(const FuzzFolder& folder, size_t size) {
  try {
    const AllocationLimit limit(size);
    read_all(folder / "tokens");
    return true;
  } catch (const Error&) {
    return false;
  }
}

// Many documents, for libFuzzer's inputs are short.
bool read_greedy(const FuzzFolder& folder) {
  PosixFileSystem files;
  TokenWriter writer(files, folder / "tokens", TokenFormat::megatron, 256);
  for (const int32_t id : std::array<int32_t, 3>{1, 2, 3})
    for (int i = 0; i < 10000; ++i) writer.add_document({&id, 1});
  writer.commit();
  require(read(folder, 30000 * 22), "a long pair is taken");
  return true;
}

}  // namespace
}  // namespace moemamba

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace moemamba;
  static const FuzzFolder folder;
  static const bool greedy = read_greedy(folder);
  require(greedy, "long token files were read");
  std::string_view rest(reinterpret_cast<const char*>(data), size);
  if (rest.size() < 3) return 0;
  const bool megatron = rest[0] == 'M';
  rest.remove_prefix(1);
  if (megatron) {
    const size_t length =
        std::min(size_t(uint8_t(rest[0]) | uint8_t(rest[1]) << 8), rest.size() - 2);
    folder.put("tokens.idx", rest.substr(2, length));
    rest.remove_prefix(2 + length);
  } else {
    std::filesystem::remove(folder / "tokens.idx");
  }
  folder.put("tokens.bin", rest);
  read(folder, size);
  return 0;
}
