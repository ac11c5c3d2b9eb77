#include "runtime/manifest.h"

#include <google/protobuf/descriptor.h>

#include <algorithm>
#include <set>

#include "core/error.h"
#include "core/file.h"

namespace moemamba {

namespace {

constexpr size_t kLargest = 64 << 20;  // bytes of a manifest

using Piece = CheckpointManifest::Piece;
using Pieces = google::protobuf::RepeatedPtrField<Piece>;

std::string digest_bytes(std::string_view data) {
  const std::string hex = sha256(data);
  std::string bytes;
  for (size_t i = 0; i < hex.size(); i += 2)
    bytes.push_back(char(std::stoi(hex.substr(i, 2), nullptr, 16)));
  return bytes;
}

// Takes a base-128 number off the front; false where it does not end, or ends past 64 bits.
bool take_varint(std::string_view& bytes, uint64_t& value) {
  value = 0;
  for (int shift = 0; shift < 64 && !bytes.empty(); shift += 7) {
    const auto byte = uint8_t(bytes.front());
    bytes.remove_prefix(1);
    value |= uint64_t(byte & 0x7f) << shift;
    if (byte < 0x80) return true;
  }
  return false;
}

// How a field is written: 0 varint, 1 eight bytes, 2 a length and as many bytes.
uint64_t wire_kind(const google::protobuf::FieldDescriptor& field) {
  using Field = google::protobuf::FieldDescriptor;
  switch (field.type()) {
    case Field::TYPE_MESSAGE:
    case Field::TYPE_STRING:
    case Field::TYPE_BYTES:
      return 2;
    case Field::TYPE_DOUBLE:
    case Field::TYPE_FIXED64:
      return 1;
    default:
      return 0;
  }
}

// Whether the bytes hold nothing but fields of `type`, each as its kind is written and within the
// message around it. Asked before protobuf sees them: it reserves memory for lengths that are only
// claimed, and keeps what it does not know in lists several times as large.
bool is_plain(std::string_view bytes, const google::protobuf::Descriptor& type) {
  while (!bytes.empty()) {
    uint64_t tag = 0, size = 8;
    if (!take_varint(bytes, tag) || tag >> 3 > INT32_MAX) return false;
    const auto* field = type.FindFieldByNumber(int(tag >> 3));
    if (!field || (tag & 7) != wire_kind(*field)) return false;
    if ((tag & 7) == 0) {
      if (!take_varint(bytes, size)) return false;
      continue;
    }
    if ((tag & 7) == 2 && !take_varint(bytes, size)) return false;
    if (size > bytes.size()) return false;
    if (field->message_type() && !is_plain(bytes.substr(0, size), *field->message_type()))
      return false;
    bytes.remove_prefix(size);
  }
  return true;
}

template <class Message>
bool parse(std::string_view bytes, Message& message) {
  return is_plain(bytes, *Message::descriptor()) &&
         message.ParseFromArray(bytes.data(), int(bytes.size()));
}

// The format that a manifest says it is of; later formats may have fields that this program does
// not know. 0: it does not begin with one, as all do that were ever written.
uint64_t format_of(std::string_view manifest) {
  constexpr uint64_t kFormatTag = CheckpointManifest::kFormatFieldNumber << 3;
  uint64_t tag = 0, format = 0;
  return take_varint(manifest, tag) && tag == kFormatTag && take_varint(manifest, format) ? format
                                                                                          : 0;
}

// A name that stays in its folder: letters, digits, ".", "_", "-"; at most 128 of them.
bool plain(const std::string& name) {
  return !name.empty() && name.size() <= 128 && name[0] != '.' &&
         name.find_first_not_of(
             "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
             "._-") == std::string::npos;
}

int64_t elements_of(const CheckpointManifest::Tensor& tensor, const std::string& path) {
  check(tensor.shape_size() <= 4, path, ": ", tensor.name(), " has ", tensor.shape_size(),
        " dims, expected at most 4");
  int64_t elements = 1;
  for (int64_t extent : tensor.shape())
    check(extent >= 0 && !__builtin_mul_overflow(elements, extent, &elements) &&
              elements < (int64_t{1} << 60),
          path, ": ", tensor.name(), ": the shape makes no sense");
  return elements;
}

void check_cover(const CheckpointManifest& manifest, const CheckpointManifest::Tensor& tensor,
                 const Pieces& pieces, int64_t elements, const char* kind,
                 const std::string& path) {
  int64_t end = 0;
  for (const Piece& piece : pieces) {
    check(piece.begin() == end && piece.end() > piece.begin() && piece.end() <= elements, path,
          ": ", tensor.name(), ": the pieces of ", kind, " do not cover it: one has elements ",
          piece.begin(), " to ", piece.end(), " where ", end, " comes next");
    check(piece.file() >= 0 && piece.file() < manifest.files_size(), path, ": ", tensor.name(),
          ": a piece lies in file ", piece.file(), " of ", manifest.files_size());
    const int64_t room = manifest.files(piece.file()).bytes() - piece.offset();
    check(piece.offset() >= 0 && piece.offset() % 4 == 0 && room >= 0 &&
              piece.end() - piece.begin() <= room / 4,
          path, ": ", tensor.name(), ": a piece ends behind ", manifest.files(piece.file()).name());
    end = piece.end();
  }
  check(end == elements, path, ": ", tensor.name(), ": the pieces of ", kind, " end at element ",
        end, " of ", elements);
}

void check_format(uint64_t format, const std::string& path) {
  const int oldest = std::max(1, kManifestFormat - 1);
  if (format > kManifestFormat)
    throw OtherFormat(concat(path, ": written in format ", format, ", this program reads up to ",
                             kManifestFormat, "; take a newer moemamba"));
  if (format < uint64_t(oldest))
    throw OtherFormat(concat(path, ": written in format ", format, ", this program reads ", oldest,
                             " to ", kManifestFormat,
                             "; let an older moemamba go on from it and save"));
}

void check_files(const CheckpointManifest& manifest, const std::string& path) {
  std::set<std::string> names;
  for (const auto& file : manifest.files()) {
    check(plain(file.name()), path, ": a file is called \"", file.name(),
          "\"; expected letters, digits, '.', '_' and '-'");
    check(names.insert(file.name()).second, path, ": ", file.name(), " is listed twice");
    check(file.bytes() >= 0 && file.sha256().size() == 32, path, ": ", file.name(),
          ": size or digest makes no sense");
  }
}

void check_tensors(const CheckpointManifest& manifest, const std::string& path) {
  const std::string* before = nullptr;
  for (const auto& tensor : manifest.tensors()) {
    check(!before || *before < tensor.name(), path, ": tensors are not in order at ",
          tensor.name());
    before = &tensor.name();
    const int64_t elements = elements_of(tensor, path);
    check_cover(manifest, tensor, tensor.value(), elements, "its values", path);
    if (tensor.exp_avg_size() + tensor.exp_avg_sq_size() == 0) continue;  // a state
    check_cover(manifest, tensor, tensor.exp_avg(), elements, "exp_avg", path);
    check_cover(manifest, tensor, tensor.exp_avg_sq(), elements, "exp_avg_sq", path);
  }
}

}  // namespace

std::string seal(const CheckpointManifest& manifest) {
  SealedManifest sealed;
  sealed.set_manifest(manifest.SerializeAsString());
  sealed.set_sha256(digest_bytes(sealed.manifest()));
  return sealed.SerializeAsString();
}

CheckpointManifest unseal(std::string_view bytes, const std::string& path) {
  check(bytes.size() <= kLargest, path, ": ", bytes.size(), " bytes; a manifest has at most ",
        kLargest);
  SealedManifest sealed;
  check(parse(bytes, sealed) && sealed.SerializeAsString() == bytes, path,
        ": damaged: not a sealed manifest");
  check(digest_bytes(sealed.manifest()) == sealed.sha256(), path,
        ": damaged: its bytes do not have the digest that it says");
  check_format(format_of(sealed.manifest()), path);
  CheckpointManifest manifest;
  check(parse(sealed.manifest(), manifest), path,
        ": damaged: it has fields that no manifest of its format has");
  check_files(manifest, path);
  check_tensors(manifest, path);
  return manifest;
}

std::string hex_of_bytes(std::string_view bytes) {
  std::string text;
  for (unsigned char byte : bytes) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

}  // namespace moemamba
