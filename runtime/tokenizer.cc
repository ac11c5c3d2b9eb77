#include "runtime/tokenizer.h"

#include <sentencepiece_processor.h>
#include <sentencepiece_trainer.h>

#include <array>
#include <numeric>
#include <unordered_map>

#include "core/error.h"

namespace moemamba {
namespace {

constexpr std::string_view kBytesFile = "moemamba tokenizer 1\nkind: bytes\n";
constexpr std::string_view kSpaceMark = "\xE2\x96\x81";  // SentencePiece writes a space as U+2581
constexpr size_t kChunk = 2048;  // SentencePiece drops sentences of more than 4192 bytes

// Bytes of the UTF-8 character that text begins with; 0 where it begins with none.
size_t character_bytes(std::string_view text) {
  const auto byte = [&](size_t i) { return i < text.size() ? uint8_t(text[i]) : 0; };
  const uint8_t lead = byte(0);
  if (lead < 0x80) return text.empty() ? 0 : 1;
  const size_t bytes = lead >= 0xC2 && lead <= 0xDF   ? 2
                       : (lead & 0xF0) == 0xE0        ? 3
                       : lead >= 0xF0 && lead <= 0xF4 ? 4
                                                      : 0;
  for (size_t i = 1; i < bytes; ++i)
    if ((byte(i) & 0xC0) != 0x80) return 0;
  // Longer than needed, a surrogate, or above U+10FFFF.
  if ((lead == 0xE0 && byte(1) < 0xA0) || (lead == 0xED && byte(1) > 0x9F)) return 0;
  if ((lead == 0xF0 && byte(1) < 0x90) || (lead == 0xF4 && byte(1) > 0x8F)) return 0;
  return bytes;
}

// Where the chunk that begins at `begin` ends: behind a newline or before a space where there is
// one (a piece holds the space before its word), never inside a character.
size_t chunk_end(std::string_view text, size_t begin) {
  if (text.size() - begin <= kChunk) return text.size();
  for (size_t end = begin + kChunk; end > begin + 1; --end)
    if (text[end - 1] == '\n' || text[end] == ' ') return end;
  size_t end = begin + kChunk;
  while (end > begin + kChunk - 4 && (uint8_t(text[end]) & 0xC0) == 0x80) --end;
  return end;
}

// Feeds whole texts in chunks, newlines included.
class Chunks : public sentencepiece::SentenceIterator {
 public:
  explicit Chunks(std::span<const std::string> texts) : texts_(texts) { Next(); }
  bool done() const override { return done_; }
  const std::string& value() const override { return value_; }
  sentencepiece::util::Status status() const override { return {}; }
  void Next() override {
    while (text_ < texts_.size() && begin_ == texts_[text_].size()) {
      ++text_;
      begin_ = 0;
    }
    done_ = text_ == texts_.size();
    if (done_) return;
    const size_t end = chunk_end(texts_[text_], begin_);
    value_.assign(texts_[text_], begin_, end - begin_);
    begin_ = end;
  }

 private:
  std::span<const std::string> texts_;
  size_t text_ = 0;
  size_t begin_ = 0;
  std::string value_;
  bool done_ = false;
};

}  // namespace

struct Tokenizer::Impl {
  TokenizerKind kind = TokenizerKind::bytes;
  std::string content;  // of the file
  std::string digest;
  int32_t end_of_document = 256;
  std::vector<std::string> pieces;      // what an id decodes to
  std::array<int32_t, 256> byte_ids{};  // ids of single bytes
  int32_t newline = 0;
  sentencepiece::SentencePieceProcessor model;  // bpe only

  void read_pieces(const std::string& name);
  // SentencePiece reads `line` without loss: no newline, no U+2581, valid UTF-8.
  void encode_plain(std::string_view line, std::vector<int32_t>& ids) const;
  void encode_line(std::string_view line, std::vector<int32_t>& ids) const;
};

void Tokenizer::Impl::read_pieces(const std::string& name) {
  end_of_document = model.eos_id();
  check(end_of_document >= 0, name, ": the model has no end-of-text piece (</s>), which ends a ",
        "document; train it with an eos_id");
  std::unordered_map<std::string, int32_t> bytes;
  newline = -1;
  for (int id = 0; id < model.GetPieceSize(); ++id) {
    std::string piece = model.IdToPiece(id);
    if (model.IsByte(id)) {
      bytes[piece] = id;
      piece = std::string(1, char(std::stoi(piece.substr(1), nullptr, 16) & 255));  // "<0x0A>"
    } else if (model.IsControl(id) || model.IsUnknown(id)) {
      piece.clear();
    } else {
      for (size_t at = 0; (at = piece.find(kSpaceMark, at)) != std::string::npos; ++at)
        piece.replace(at, kSpaceMark.size(), " ");
      if (piece == "\n") newline = id;
    }
    pieces.push_back(std::move(piece));
  }
  check(bytes.size() == 256, name, ": expected 256 byte pieces, found ", bytes.size(),
        "; train the model with byte_fallback");
  for (const auto& [piece, id] : bytes) byte_ids[uint8_t(pieces[size_t(id)][0])] = id;
  if (newline < 0) newline = byte_ids['\n'];
}

void Tokenizer::Impl::encode_plain(std::string_view line, std::vector<int32_t>& ids) const {
  if (line.empty()) return;
  std::vector<int> found;
  const auto status = model.Encode(absl::string_view(line.data(), line.size()), &found);
  check(status.ok(), "SentencePiece cannot encode: ", status.ToString());
  ids.insert(ids.end(), found.begin(), found.end());
}

void Tokenizer::Impl::encode_line(std::string_view line, std::vector<int32_t>& ids) const {
  size_t plain = 0;  // line[plain, at) waits for SentencePiece
  for (size_t at = 0; at < line.size();) {
    const size_t bytes = character_bytes(line.substr(at));
    const bool reserved = line.substr(at, kSpaceMark.size()) == kSpaceMark || line[at] == '\0';
    if (bytes > 0 && !reserved) {
      at += bytes;
      continue;
    }
    encode_plain(line.substr(plain, at - plain), ids);
    for (size_t end = at + std::max<size_t>(bytes, 1); at < end; ++at)
      ids.push_back(byte_ids[uint8_t(line[at])]);
    plain = at;
  }
  encode_plain(line.substr(plain), ids);
}

Tokenizer Tokenizer::bytes() {
  auto impl = std::make_shared<Impl>();
  impl->content = kBytesFile;
  impl->digest = sha256(kBytesFile);
  for (int byte = 0; byte < 256; ++byte) impl->pieces.emplace_back(1, char(byte));
  impl->pieces.emplace_back();
  std::iota(impl->byte_ids.begin(), impl->byte_ids.end(), 0);
  return Tokenizer(std::move(impl));
}

Tokenizer Tokenizer::train_bpe(std::span<const std::string> texts, int vocabulary) {
  // Without these the text is not reproduced; newlines are pieces of their own, so that lines can
  // be encoded one by one.
  const std::unordered_map<std::string, std::string> options = {
      {"model_type", "bpe"},
      {"vocab_size", std::to_string(vocabulary)},
      {"byte_fallback", "true"},
      {"character_coverage", "1.0"},
      {"normalization_rule_name", "identity"},
      {"remove_extra_whitespaces", "false"},
      {"add_dummy_prefix", "false"},
      {"allow_whitespace_only_pieces", "true"},
      {"user_defined_symbols", "\n"},
      {"num_threads", "1"},
      {"minloglevel", "2"}};
  Chunks chunks(texts);
  check(!chunks.done(), "expected text to train a tokenizer on, found none");
  std::string content;
  const auto status = sentencepiece::SentencePieceTrainer::Train(options, &chunks, &content);
  check(status.ok(), "SentencePiece cannot train a vocabulary of ", vocabulary, ": ",
        status.ToString(), "; give it more text or another vocabulary");
  return from_content(std::move(content), "trained tokenizer");
}

Tokenizer Tokenizer::from_content(std::string content, const std::string& name) {
  if (content == kBytesFile) return bytes();
  check(!content.empty(), name, ": expected a tokenizer, found an empty file");
  auto impl = std::make_shared<Impl>();
  impl->kind = TokenizerKind::bpe;
  const auto status =
      impl->model.LoadFromSerializedProto(absl::string_view(content.data(), content.size()));
  check(status.ok(), name,
        ": neither a SentencePiece model nor a bytes tokenizer: ", status.ToString());
  impl->read_pieces(name);
  impl->digest = sha256(content);
  impl->content = std::move(content);
  const Tokenizer tokenizer(std::move(impl));
  const std::string probe = " two  spaces\n\tand \xEF\xAC\x81 ";  // a ligature, which NFKC changes
  check(tokenizer.decode(tokenizer.encode(probe)) == probe, name, ": this SentencePiece model ",
        "changes the text; train it with normalization_rule_name=identity, ",
        "remove_extra_whitespaces=false and add_dummy_prefix=false");
  return tokenizer;
}

Tokenizer Tokenizer::load(const std::string& path) {
  return from_content(read_file(path), path);
}

void Tokenizer::save(FileSystem& files, const std::string& path) const {
  write_file(files, path, impl_->content);
}

TokenizerKind Tokenizer::kind() const {
  return impl_->kind;
}
int Tokenizer::vocabulary() const {
  return int(impl_->pieces.size());
}
int32_t Tokenizer::end_of_document() const {
  return impl_->end_of_document;
}
const std::string& Tokenizer::content() const {
  return impl_->content;
}
std::string Tokenizer::digest() const {
  return impl_->digest;
}

void Tokenizer::encode(std::string_view text, std::vector<int32_t>& ids) const {
  if (impl_->kind == TokenizerKind::bytes) {
    for (const char c : text) ids.push_back(uint8_t(c));
    return;
  }
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    impl_->encode_line(text.substr(begin, end - begin), ids);
    if (end < text.size()) ids.push_back(impl_->newline);
    begin = end + 1;
  }
}

std::vector<int32_t> Tokenizer::encode(std::string_view text) const {
  std::vector<int32_t> ids;
  encode(text, ids);
  return ids;
}

std::string Tokenizer::decode(std::span<const int32_t> ids) const {
  std::string text;
  for (const int32_t id : ids) {
    check(id >= 0 && id < vocabulary(), "token id ", id, " is outside the vocabulary of ",
          vocabulary());
    text += impl_->pieces[size_t(id)];
  }
  return text;
}

std::string Tokenizer::description() const {
  return concat(kind() == TokenizerKind::bytes ? "bytes" : "bpe", ", vocabulary ", vocabulary());
}

}  // namespace moemamba
