#include "runtime/token_files.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "core/error.h"

namespace moemamba {
namespace {

// Megatron-LM's .idx: magic, u64 version, u8 width code, u64 sequences, u64 entries of the document
// list; then i32 lengths, i64 byte offsets, i64 first sequence of each document (and the end).
constexpr std::string_view kIndexMagic("MMIDIDX\0\0", 9);
constexpr int64_t kIndexHeader = 34;
// llm.c's .bin: 256 words, of which magic, version, number of tokens.
constexpr int64_t kLlmcHeader = 1024;
constexpr int32_t kLlmcNarrow = 20240520;     // u16 tokens, version 1
constexpr int32_t kLlmcWide = 20240801;       // u32 tokens, version 7
constexpr int64_t kNarrowVocabulary = 65500;  // Megatron's border between u16 and i32

template <class T>
T load(const std::byte* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));  // the arrays of an .idx are not aligned
  return value;
}

template <class T>
void widen(const std::byte* from, int64_t count, int32_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    const T id = load<T>(from + i * int64_t(sizeof(T)));
    if constexpr (sizeof(T) < 4) {
      out[i] = int32_t(id);
    } else {
      const bool fits = id >= T(0) && uint64_t(id) <= uint64_t(std::numeric_limits<int32_t>::max());
      out[i] = fits ? int32_t(id) : -1;
    }
  }
}

bool ends_with(const std::string& text, std::string_view end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// "data/train", from that, "data/train.bin" or "data/train.idx".
std::string stem_of(const std::string& path) {
  const bool suffix = ends_with(path, ".bin") || ends_with(path, ".idx");
  return suffix ? path.substr(0, path.size() - 4) : path;
}

std::string bin_path(const std::string& path) {
  const std::string bin = stem_of(path) + ".bin";
  return file_exists(bin) || !file_exists(path) ? bin : path;
}

TokenFormat recognise(const MappedFile& tokens, const std::string& stem) {
  if (file_exists(stem + ".idx")) return TokenFormat::megatron;
  if (tokens.bytes().size() >= 8) {
    const auto magic = load<int32_t>(tokens.bytes().data());
    const auto version = load<int32_t>(tokens.bytes().data() + 4);
    if ((magic == kLlmcNarrow && version == 1) || (magic == kLlmcWide && version == 7))
      return TokenFormat::llmc;
  }
  return TokenFormat::raw_u16;
}

}  // namespace

TokenFile::TokenFile(const std::string& path, std::optional<TokenFormat> format)
    : tokens_(bin_path(path)) {
  format_ = format ? *format : recognise(tokens_, stem_of(path));
  const int64_t bytes = int64_t(tokens_.bytes().size());
  switch (format_) {
    case TokenFormat::megatron:
      open_megatron(stem_of(path));
      break;
    case TokenFormat::llmc:
      open_llmc();
      break;
    case TokenFormat::raw_u16:
      check(bytes % 2 == 0, this->path(), ": expected 16-bit tokens, found ", bytes,
            " bytes: the file is cut off or of another format");
      size_ = bytes / 2;
      break;
  }
  check(size_ > 0, this->path(), ": holds no tokens");
}

int64_t TokenFile::width_bytes() const {
  switch (width_) {
    case Width::u8:
    case Width::i8:
      return 1;
    case Width::i16:
    case Width::u16:
      return 2;
    case Width::i32:
    case Width::u32:
      return 4;
    case Width::i64:
      return 8;
  }
  return 0;
}

void TokenFile::open_megatron(const std::string& stem) {
  index_.emplace(stem + ".idx");
  const std::string& name = index_->path();
  const auto index = index_->bytes();
  const int64_t bytes = int64_t(index.size());
  check(bytes >= kIndexHeader, name, ": expected an index of at least ", kIndexHeader,
        " bytes, found ", bytes, ": the file is cut off");
  check(index_->text().substr(0, 9) == kIndexMagic, name, ": is no Megatron index (wrong magic)");
  const auto version = load<uint64_t>(&index[9]);
  check(version == 1, name, ": expected index version 1, found ", version);
  const int code = int(index[17]);
  check((code >= 1 && code <= 5) || code == 8, name, ": expected tokens of an integer type, found ",
        "type code ", code);
  width_ = Width(code);
  const auto sequences = load<uint64_t>(&index[18]), entries = load<uint64_t>(&index[26]);
  check(sequences < (uint64_t{1} << 48) && entries >= 1 && entries < (uint64_t{1} << 48), name,
        ": impossible numbers of sequences (", sequences, ") or documents (", entries, " - 1)");
  const int64_t expected = kIndexHeader + int64_t(sequences) * 12 + int64_t(entries) * 8;
  check(bytes == expected || bytes == expected + int64_t(sequences), name, ": ", sequences,
        " sequences and ", entries - 1, " documents need ", expected, " bytes, found ", bytes);
  sequences_ = int64_t(sequences);
  documents_ = int64_t(entries) - 1;
  check_megatron_sequences();
}

void TokenFile::check_megatron_sequences() {
  const std::string& name = index_->path();
  const std::byte* lengths = &index_->bytes()[kIndexHeader];
  const std::byte* offsets = lengths + sequences_ * 4;
  const std::byte* documents = offsets + sequences_ * 8;
  const int64_t bytes = int64_t(tokens_.bytes().size());
  int64_t begin = 0;
  for (int64_t s = 0; s < sequences_; ++s) {
    const auto length = load<int32_t>(lengths + s * 4);
    const auto offset = load<int64_t>(offsets + s * 8);
    check(length >= 0 && offset == begin, name, ": sequence ", s, " should start at byte ", begin,
          ", found byte ", offset, " and length ", length);
    begin += length * width_bytes();
    check(begin <= bytes, path(), ": cut off: sequence ", s, " ends at byte ", begin,
          ", the file has ", bytes);
  }
  check(begin == bytes, path(), ": expected ", begin, " bytes of tokens, found ", bytes);
  int64_t last = 0;
  for (int64_t d = 0; d <= documents_; ++d) {
    const auto sequence = load<int64_t>(documents + d * 8);
    check(sequence >= last && sequence <= sequences_, name, ": document ", d,
          " starts at sequence ", sequence, ", expected ", last, " to ", sequences_);
    last = sequence;
  }
  size_ = bytes / width_bytes();
}

void TokenFile::open_llmc() {
  const int64_t bytes = int64_t(tokens_.bytes().size());
  check(bytes >= kLlmcHeader, path(), ": expected a header of ", kLlmcHeader, " bytes, found ",
        bytes, ": the file is cut off or of another format");
  const std::byte* header = tokens_.bytes().data();
  const auto magic = load<int32_t>(header), version = load<int32_t>(header + 4);
  const bool narrow = magic == kLlmcNarrow && version == 1;
  check(narrow || (magic == kLlmcWide && version == 7), path(), ": expected llm.c's magic ",
        kLlmcNarrow, " version 1 or ", kLlmcWide, " version 7, found ", magic, " version ",
        version);
  width_ = narrow ? Width::u16 : Width::u32;
  header_ = kLlmcHeader;
  size_ = load<int32_t>(header + 8);
  check(size_ >= 0 && bytes == header_ + size_ * width_bytes(), path(), ": its header promises ",
        size_, " tokens (", header_ + size_ * width_bytes(), " bytes), found ", bytes, " bytes");
}

void TokenFile::read(int64_t position, int64_t count, int32_t* out) const {
  check(position >= 0 && count >= 0 && position + count <= size_, path(), ": tokens ", position,
        " + ", count, " asked for, the file has ", size_);
  const std::byte* from = tokens_.bytes().data() + header_ + position * width_bytes();
  switch (width_) {
    case Width::u8:
      return widen<uint8_t>(from, count, out);
    case Width::i8:
      return widen<int8_t>(from, count, out);
    case Width::i16:
      return widen<int16_t>(from, count, out);
    case Width::u16:
      return widen<uint16_t>(from, count, out);
    case Width::i32:
      return widen<int32_t>(from, count, out);
    case Width::u32:
      return widen<uint32_t>(from, count, out);
    case Width::i64:
      return widen<int64_t>(from, count, out);
  }
}

std::string TokenFile::place(int64_t position) const {
  return concat(path(), ", token ", position, " (byte ", header_ + position * width_bytes(), ")");
}

int64_t TokenFile::document_begin(int64_t document) const {
  check(document >= 0 && document <= documents_, path(), ": document ", document, " of ",
        documents_);
  const std::byte* offsets = &index_->bytes()[kIndexHeader] + sequences_ * 4;
  const auto sequence = load<int64_t>(offsets + (sequences_ + document) * 8);
  if (sequence == sequences_) return size_;
  return load<int64_t>(offsets + sequence * 8) / width_bytes();
}

void TokenFile::mark_starts(int64_t position, int64_t count, int32_t end_of_document,
                            uint8_t* starts) const {
  for (int64_t i = 0; i < count; ++i) {
    int32_t before = -1;
    if (position + i > 0 && end_of_document >= 0) read(position + i - 1, 1, &before);
    starts[i] = position + i == 0 || (end_of_document >= 0 && before == end_of_document);
  }
  int64_t low = 0, high = documents_;  // the first document that begins at `position` or later
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (document_begin(middle) < position)
      low = middle + 1;
    else
      high = middle;
  }
  for (int64_t d = low; d < documents_ && document_begin(d) < position + count; ++d)
    starts[document_begin(d) - position] = 1;
}

TokenWriter::TokenWriter(FileSystem& files, const std::string& path, TokenFormat format,
                         int64_t vocabulary)
    : files_(files),
      stem_(stem_of(path)),
      format_(format),
      vocabulary_(vocabulary),
      wide_(vocabulary >= kNarrowVocabulary),
      tokens_(files, stem_ + ".bin") {
  check(format != TokenFormat::raw_u16, path, ": raw u16 files are read, never written");
  check(vocabulary > 0, path, ": expected a vocabulary, found ", vocabulary);
  const std::string header(format == TokenFormat::llmc ? kLlmcHeader : 0, '\0');
  tokens_.write(header);
}

void TokenWriter::add_document(std::span<const int32_t> ids) {
  check(ids.size() <= size_t(std::numeric_limits<int32_t>::max()), stem_, ".bin: a document of ",
        ids.size(), " tokens; the format allows 2^31 - 1");
  for (const int32_t id : ids)
    check(id >= 0 && id < vocabulary_, stem_, ".bin: token id ", id,
          " is outside the vocabulary of ", vocabulary_);
  if (wide_) {
    tokens_.write(ids.data(), ids.size() * 4);
  } else {
    narrow_.assign(ids.begin(), ids.end());
    tokens_.write(narrow_.data(), narrow_.size() * 2);
  }
  if (format_ == TokenFormat::megatron) lengths_.push_back(int64_t(ids.size()));
  size_ += int64_t(ids.size());
}

void TokenWriter::commit() {
  check(size_ > 0, stem_, ".bin: no tokens to write");
  if (format_ == TokenFormat::llmc) {
    check(size_ <= std::numeric_limits<int32_t>::max(), stem_, ".bin: ", size_,
          " tokens; llm.c's format allows 2^31 - 1, write megatron instead");
    const int32_t header[3] = {wide_ ? kLlmcWide : kLlmcNarrow, wide_ ? 7 : 1, int32_t(size_)};
    tokens_.write_at(0, header, sizeof(header));
    return tokens_.commit();
  }
  files_.remove(stem_ + ".idx");  // an old index must never meet new tokens
  tokens_.commit();
  write_index();
}

void TokenWriter::write_index() {
  AtomicFile index(files_, stem_ + ".idx");
  const auto put = [&]<class T>(T value) { index.write(&value, sizeof(value)); };
  index.write(kIndexMagic);
  put(uint64_t{1});
  put(uint8_t(wide_ ? 4 : 8));
  put(uint64_t(lengths_.size()));
  put(uint64_t(lengths_.size() + 1));
  for (const int64_t length : lengths_) put(int32_t(length));
  int64_t offset = 0;
  for (const int64_t length : lengths_) {
    put(offset);
    offset += length * (wide_ ? 4 : 2);
  }
  for (int64_t document = 0; document <= int64_t(lengths_.size()); ++document) put(document);
  index.commit();
}

}  // namespace moemamba
