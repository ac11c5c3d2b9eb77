// A checkpoint's MANIFEST.pb: the file's bytes as they are, and as a manifest under a good seal.
#include "runtime/manifest.h"

#include "core/file.h"
#include "tests/fuzz/fuzz.h"

namespace moemamba {
namespace {

void read(const std::string& bytes) {
  try {
    const AllocationLimit limit(bytes.size(), 64);
    const CheckpointManifest manifest = unseal(bytes, "MANIFEST.pb");
    for (const auto& file : manifest.files())
      require(file.name().find('/') == std::string::npos && file.name()[0] != '.' &&
                  file.name().find('\0') == std::string::npos,
              "names stay in their folder");
    for (const auto& tensor : manifest.tensors())
      for (const auto* pieces : {&tensor.value(), &tensor.exp_avg(), &tensor.exp_avg_sq()})
        for (const auto& piece : *pieces)
          require(piece.offset() >= 0 && piece.offset() + (piece.end() - piece.begin()) * 4 <=
                                             manifest.files(piece.file()).bytes(),
                  "pieces lie within their files");
  } catch (const Error&) {
  }
}

// What reads a checkpoint's files does not follow a link out of its folder.
bool refuses_links() {
  const FuzzFolder folder;
  folder.put("file", "content");
  std::filesystem::create_symlink(folder / "file", folder / "link");
  try {
    const InputFile file(folder / "link");
    return false;
  } catch (const Error&) {
    return true;
  }
}

}  // namespace
}  // namespace moemamba

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace moemamba;
  // protobuf makes its descriptors once in a process, whatever comes in.
  static const void* const made[] = {CheckpointManifest::descriptor(), SealedManifest::descriptor(),
                                     CheckpointManifest::Piece::descriptor()};
  require(made[0] && made[1] && made[2], "protobuf knows the manifest's messages");
  static const bool refused = refuses_links();
  require(refused, "links are not followed");
  const std::string bytes(reinterpret_cast<const char*>(data), size);
  read(bytes);
  SealedManifest sealed;
  sealed.set_manifest(bytes);
  const std::string hex = sha256(bytes);
  for (size_t i = 0; i < hex.size(); i += 2)
    sealed.mutable_sha256()->push_back(char(std::stoi(hex.substr(i, 2), nullptr, 16)));
  read(sealed.SerializeAsString());
  return 0;
}
