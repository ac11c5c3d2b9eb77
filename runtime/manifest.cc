#include "runtime/manifest.h"

#include <google/protobuf/descriptor.h>

#include <algorithm>
#include <bit>
#include <numeric>

#include "core/error.h"
#include "core/file.h"

namespace moemamba {

namespace {

constexpr size_t kLargest = 64 << 20;    // bytes of a manifest
constexpr size_t kLongestName = 1000;  // bytes, of a tensor

std::string digest_bytes(std::string_view data) {
  const std::string hex = sha256(data);
  std::string bytes;
  for (size_t i = 0; i < hex.size(); i += 2)
    bytes.push_back(char(std::stoi(hex.substr(i, 2), nullptr, 16)));
  return bytes;
}

int wire_kind(const google::protobuf::FieldDescriptor& field) {
  using Field = google::protobuf::FieldDescriptor;
  switch (field.type()) {
    case Field::TYPE_MESSAGE:
    case Field::TYPE_STRING:
    case Field::TYPE_BYTES:
      return WireField::bytes;
    case Field::TYPE_DOUBLE:
    case Field::TYPE_FIXED64:
      return WireField::fixed64;
    default:
      return WireField::varint;
  }
}

// Whether the bytes hold nothing but fields of `type`, as protobuf writes them: each as its kind is
// written and within the message around it, in the order of their numbers, single ones once.
bool is_written_as(const google::protobuf::Descriptor& type, std::string_view bytes) {
  WireField field;
  for (int before = 0; !bytes.empty(); before = field.number) {
    if (!take_field(bytes, field)) return false;
    const auto* known = type.FindFieldByNumber(field.number);
    if (!known || field.kind != wire_kind(*known) || field.number < before) return false;
    if (field.number == before && !known->is_repeated()) return false;
    if (known->message_type() && !is_written_as(*known->message_type(), field.text)) return false;
  }
  return true;
}

// The manifest within sealed bytes, if these are exactly what serialising it gives and have the
// digest that they say.
std::string_view sealed_manifest(std::string_view bytes, const std::string& path) {
  constexpr int kManifest = SealedManifest::kManifestFieldNumber;
  constexpr int kDigest = SealedManifest::kSha256FieldNumber;
  std::string_view rest = bytes;
  WireField manifest, digest;
  const bool whole = take_field(rest, manifest) && manifest.number == kManifest &&
                     manifest.kind == WireField::bytes && take_field(rest, digest) &&
                     digest.number == kDigest && digest.kind == WireField::bytes && rest.empty();
  // No number took more bytes than it needs: tags one, the digest's length one.
  size_t shortest = 1;
  for (size_t length = manifest.text.size(); length >= 128; length >>= 7) ++shortest;
  check(whole && digest.text.size() == 32 &&
            bytes.size() == 1 + shortest + manifest.text.size() + 2 + 32,
        path, ": damaged: not a sealed manifest");
  check(digest_bytes(manifest.text) == digest.text, path,
        ": damaged: its bytes do not have the digest that it says");
  return manifest.text;
}

// The format that a manifest says it is of; later formats may have fields that this program does
// not know. 0: it does not begin with one, as all do that were ever written.
uint64_t format_of(std::string_view manifest) {
  constexpr uint64_t kFormatTag = CheckpointManifest::kFormatFieldNumber << 3;
  uint64_t tag = 0, format = 0;
  return take_varint(manifest, tag) && tag == kFormatTag && take_varint(manifest, format) ? format
                                                                                          : 0;
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

void set_fact(CheckpointManifest& facts, const WireField& given) {
  using Field = google::protobuf::FieldDescriptor;
  const Field& field = *CheckpointManifest::descriptor()->FindFieldByNumber(given.number);
  const auto& reflection = *facts.GetReflection();
  switch (field.cpp_type()) {
    case Field::CPPTYPE_INT32:
      return reflection.SetInt32(&facts, &field, int32_t(given.value));
    case Field::CPPTYPE_INT64:
      return reflection.SetInt64(&facts, &field, int64_t(given.value));
    case Field::CPPTYPE_UINT64:
      return reflection.SetUInt64(&facts, &field, given.value);
    case Field::CPPTYPE_DOUBLE:
      return reflection.SetDouble(&facts, &field, std::bit_cast<double>(given.value));
    case Field::CPPTYPE_STRING:
      return reflection.SetString(&facts, &field, std::string(given.text));
    default:
      throw Error(concat("a fact of the manifest has a type that is not read: ", field.name()));
  }
}

void check_files(const Manifest& manifest, const std::string& path) {
  const auto files = manifest.files();
  for (const auto& file : files) {
    check(is_plain_name(file.name_view()), path, ": a file is called \"",
          file.name_view().substr(0, 128), "\"; expected letters, digits, '.', '_' and '-'");
    check(file.bytes() >= 0 && file.sha256().size() == 32, path, ": ", file.name_view(),
          ": size or digest makes no sense");
  }
  std::vector<uint32_t> by_name(files.size());
  std::iota(by_name.begin(), by_name.end(), 0u);
  std::sort(by_name.begin(), by_name.end(),
            [&](uint32_t a, uint32_t b) { return files[a].name_view() < files[b].name_view(); });
  for (size_t i = 1; i < by_name.size(); ++i)
    check(files[by_name[i - 1]].name_view() != files[by_name[i]].name_view(), path, ": ",
          files[by_name[i]].name_view(), " is listed twice");
}

int64_t elements_of(std::string_view tensor, std::string_view name, const std::string& path) {
  int64_t elements = 1;
  int dims = 0;
  constexpr int kShape = CheckpointManifest::Tensor::kShapeFieldNumber;
  for (const WireField& extent : WireFields(tensor, kShape)) {
    check(++dims <= 4, path, ": ", name, " has more than 4 dims");
    check(int64_t(extent.value) >= 0 &&
              !__builtin_mul_overflow(elements, int64_t(extent.value), &elements) &&
              elements < (int64_t{1} << 60),
          path, ": ", name, ": the shape makes no sense");
  }
  return elements;
}

void check_cover(const Manifest& manifest, std::string_view name, const Manifest::Pieces& pieces,
                 int64_t elements, const char* kind, const std::string& path) {
  int64_t end = 0;
  for (const Manifest::Piece& piece : pieces) {
    check(piece.begin() == end && piece.end() > piece.begin() && piece.end() <= elements, path,
          ": ", name, ": the pieces of ", kind, " do not cover it: one has elements ",
          piece.begin(), " to ", piece.end(), " where ", end, " comes next");
    check(piece.file() >= 0 && piece.file() < manifest.files_size(), path, ": ", name,
          ": a piece lies in file ", piece.file(), " of ", manifest.files_size());
    const Manifest::File file = manifest.files(piece.file());
    check(piece.offset() >= 0 && piece.offset() % 4 == 0 && piece.offset() <= file.bytes() &&
              piece.end() - piece.begin() <= (file.bytes() - piece.offset()) / 4,
          path, ": ", name, ": a piece ends behind ", file.name_view());
    end = piece.end();
  }
  check(end == elements, path, ": ", name, ": the pieces of ", kind, " end at element ", end,
        " of ", elements);
}

void check_tensor(const Manifest& manifest, const Manifest::Tensor& tensor, int64_t elements,
                  const std::string& path) {
  const std::string_view name = tensor.name_view();
  check_cover(manifest, name, tensor.value(), elements, "its values", path);
  if (tensor.exp_avg().empty() && tensor.exp_avg_sq().empty()) return;  // a state
  check_cover(manifest, name, tensor.exp_avg(), elements, "exp_avg", path);
  check_cover(manifest, name, tensor.exp_avg_sq(), elements, "exp_avg_sq", path);
}

void check_tensors(const Manifest& manifest, const std::string& path) {
  std::optional<std::string_view> before;
  for (const auto& tensor : manifest.tensors()) {
    const std::string_view name = tensor.name_view();
    check(name.size() <= kLongestName, path, ": a tensor's name has ", name.size(),
          " bytes; expected at most ", kLongestName);
    check(!before || *before < name, path, ": tensors are not in order at ", name);
    before = name;
    check_tensor(manifest, tensor, elements_of(tensor.wire(), name, path), path);
  }
}

}  // namespace

bool is_plain_name(std::string_view name) {
  constexpr std::string_view kAllowed =
      "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";
  return !name.empty() && name.size() <= 128 && name[0] != '.' &&
         name.find_first_not_of(kAllowed) == std::string_view::npos;
}

std::string_view Manifest::File::name_view() const {
  return only_field(wire_, CheckpointManifest::File::kNameFieldNumber).text;
}
int64_t Manifest::File::bytes() const {
  return int64_t(only_field(wire_, CheckpointManifest::File::kBytesFieldNumber).value);
}
std::string_view Manifest::File::sha256() const {
  return only_field(wire_, CheckpointManifest::File::kSha256FieldNumber).text;
}

std::string_view Manifest::Tensor::name_view() const {
  return only_field(wire_, CheckpointManifest::Tensor::kNameFieldNumber).text;
}
Shape Manifest::Tensor::shape() const {
  Shape shape;
  for (const WireField& extent : WireFields(wire_, CheckpointManifest::Tensor::kShapeFieldNumber))
    shape.extents[size_t(shape.dims++)] = int64_t(extent.value);
  return shape;
}
Manifest::Pieces Manifest::Tensor::value() const {
  return {wire_, CheckpointManifest::Tensor::kValueFieldNumber};
}
Manifest::Pieces Manifest::Tensor::exp_avg() const {
  return {wire_, CheckpointManifest::Tensor::kExpAvgFieldNumber};
}
Manifest::Pieces Manifest::Tensor::exp_avg_sq() const {
  return {wire_, CheckpointManifest::Tensor::kExpAvgSqFieldNumber};
}

Manifest::Piece Manifest::Pieces::Iterator::operator*() const {
  Piece piece;
  WireField field;
  for (std::string_view rest = (*at_).text; take_field(rest, field);) {
    if (field.number == Piece::kBeginFieldNumber) piece.set_begin(int64_t(field.value));
    if (field.number == Piece::kEndFieldNumber) piece.set_end(int64_t(field.value));
    if (field.number == Piece::kFileFieldNumber) piece.set_file(int32_t(field.value));
    if (field.number == Piece::kOffsetFieldNumber) piece.set_offset(int64_t(field.value));
  }
  return piece;
}

std::optional<Manifest::Tensor> Manifest::find(std::string_view tensor) const {
  const auto at = std::lower_bound(
      tensors_.begin(), tensors_.end(), tensor, [&](uint32_t place, std::string_view name) {
        return Tensor(field_at(bytes_, place).text).name_view() < name;
      });
  if (at == tensors_.end()) return {};
  const Tensor found(field_at(bytes_, *at).text);
  if (found.name_view() != tensor) return {};
  return found;
}

// Two walks: what is counted first takes no more memory than it needs.
void Manifest::read(std::string_view manifest, const std::string& path) {
  constexpr int kFiles = CheckpointManifest::kFilesFieldNumber;
  constexpr int kTensors = CheckpointManifest::kTensorsFieldNumber;
  check(is_written_as(*CheckpointManifest::descriptor(), manifest), path,
        ": damaged: it has fields that no manifest of its format has, or not in their order");
  WireField field;
  size_t files = 0, tensors = 0;
  for (std::string_view rest = manifest; take_field(rest, field);) {
    files += field.number == kFiles;
    tensors += field.number == kTensors;
    // So that numbering them, at four bytes each, takes less than what is numbered.
    check(field.number != kFiles || field.text.size() >= 34, path, ": file ", files - 1,
          " has no name or no digest");
    check(field.number != kTensors || field.text.size() >= 2, path, ": tensor ", tensors - 1,
          " has neither name nor shape");
  }
  files_.reserve(files);
  tensors_.reserve(tensors);
  for (std::string_view rest = manifest; !rest.empty();) {
    const auto place = uint32_t(rest.data() - bytes_.data());
    take_field(rest, field);
    if (field.number == kFiles)
      files_.push_back(place);
    else if (field.number == kTensors)
      tensors_.push_back(place);
    else
      set_fact(facts_, field);
  }
}

std::string seal(const CheckpointManifest& manifest) {
  SealedManifest sealed;
  sealed.set_manifest(manifest.SerializeAsString());
  sealed.set_sha256(digest_bytes(sealed.manifest()));
  return sealed.SerializeAsString();
}

Manifest unseal(std::string bytes, const std::string& path) {
  check(bytes.size() <= kLargest, path, ": ", bytes.size(), " bytes; a manifest has at most ",
        kLargest);
  Manifest manifest;
  manifest.bytes_ = std::move(bytes);
  const std::string_view inner = sealed_manifest(manifest.bytes_, path);
  check_format(format_of(inner), path);
  manifest.read(inner, path);
  check_files(manifest, path);
  check_tensors(manifest, path);
  return manifest;
}

}  // namespace moemamba
