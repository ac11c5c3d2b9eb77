// A checkpoint's MANIFEST.pb: the file's bytes as they are, and as a manifest under a good seal.
#include "runtime/manifest.h"

#include <bit>
#include <optional>

#include "core/file.h"
#include "tests/fuzz/fuzz.h"

namespace moemamba {
namespace {

// protobuf takes what was accepted for the same manifest.
void expect_message(const Manifest& manifest, std::string_view inner) {
  CheckpointManifest message;
  require(message.ParseFromArray(inner.data(), int(inner.size())), "protobuf reads it as well");
  require(message.files_size() == manifest.files_size() &&
              message.tensors_size() == manifest.tensors_size(),
          "lists are as long to protobuf");
  for (int i = 0; i < message.files_size(); ++i)
    require(message.files(i).name() == manifest.files(i).name() &&
                message.files(i).bytes() == manifest.files(i).bytes() &&
                message.files(i).sha256() == manifest.files(i).sha256(),
            "files are the same to protobuf");
  for (const auto& expected : message.tensors()) {
    const std::optional<Manifest::Tensor> found = manifest.find(expected.name());
    require(found && found->name() == expected.name(), "every tensor is found by its name");
    require(found->shape().dims == expected.shape_size(), "shapes are the same to protobuf");
    int at = 0;
    for (const Manifest::Piece& piece : found->value())
      require(piece.SerializeAsString() == expected.value(at++).SerializeAsString(),
              "pieces are the same to protobuf");
    require(at == expected.value_size(), "there are as many pieces to protobuf");
  }
  message.clear_files();
  message.clear_tensors();
  require(message.SerializeAsString() == manifest.facts().SerializeAsString(),
          "facts are the same to protobuf");
}

void expect_within_files(const Manifest& manifest) {
  for (const auto& file : manifest.files())
    require(file.name().find('/') == std::string::npos && file.name()[0] != '.' &&
                file.name().find('\0') == std::string::npos,
            "names stay in their folder");
  for (const auto& tensor : manifest.tensors())
    for (const auto& pieces : {tensor.value(), tensor.exp_avg(), tensor.exp_avg_sq()})
      for (const auto& piece : pieces)
        require(piece.offset() >= 0 && piece.offset() + (piece.end() - piece.begin()) * 4 <=
                                           manifest.files(piece.file()).bytes(),
                "pieces lie within their files");
}

// Whether it was taken. The bytes that the reader is given count among what it takes.
bool read(const std::string& bytes, std::string_view inner) {
  try {
    std::optional<AllocationLimit> limit(bytes.size());
    const Manifest manifest = unseal(bytes, "MANIFEST.pb");
    expect_within_files(manifest);
    limit.reset();
    expect_message(manifest, inner);
    return true;
  } catch (const Error&) {
    return false;
  }
}

bool read_sealed(const std::string& manifest) {
  SealedManifest sealed;
  sealed.set_manifest(manifest);
  const std::string hex = sha256(manifest);
  for (size_t i = 0; i < hex.size(); i += 2)
    sealed.mutable_sha256()->push_back(char(std::stoi(hex.substr(i, 2), nullptr, 16)));
  return read(sealed.SerializeAsString(), manifest);
}

std::string digits(int i) {
  std::string text;
  for (; i > 0; i /= 26) text += char('a' + i % 26);
  return text;
}

// Manifests that ask for as much as they can: the inputs of libFuzzer are short, and of those the
// bound's constant part is the larger one.
bool read_greedy() {
  std::vector<std::string> names;
  for (int i = 1; i < 20000; ++i) names.push_back(digits(i));
  std::sort(names.begin(), names.end());
  CheckpointManifest tensors, pieces, files, text;
  for (auto* m : {&tensors, &pieces, &files, &text}) m->set_format(kManifestFormat);
  for (const std::string& name : names) {
    tensors.add_tensors()->set_name(name);
    tensors.mutable_tensors()->rbegin()->add_shape(0);
    auto* file = files.add_files();
    file->set_name(name);
    file->set_bytes(1 << 20);
    file->set_sha256(std::string(32, 'x'));
  }
  *pieces.add_files() = files.files(0);
  pieces.add_tensors()->add_shape(10000);
  for (int i = 0; i < 10000; ++i) {
    auto* piece = pieces.mutable_tensors(0)->add_value();
    if (i) piece->set_begin(i);
    piece->set_end(i + 1);
  }
  text.set_config(std::string(1 << 20, 'x'));
  for (auto* m : {&tensors, &pieces, &files, &text})
    require(read_sealed(m->SerializeAsString()), "a good manifest is taken");
  std::string empty("\x08\x01", 2);
  for (int i = 0; i < 100000; ++i) empty += std::string("\x82\x01\x00", 3);
  read_sealed(empty);
  read_sealed(std::string("\x08\x01", 2) + std::string(200000, '\x7a'));
  return true;
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
  static const bool greedy = read_greedy();
  require(greedy, "greedy manifests were read");
  const std::string bytes(reinterpret_cast<const char*>(data), size);
  SealedManifest outer;
  read(bytes, outer.ParseFromString(bytes) ? outer.manifest() : "");
  read_sealed(bytes);
  return 0;
}
