#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/file.h"

namespace moemamba {

enum class TokenizerKind { bytes, bpe };

// Text to token ids and back without loss: decode(encode(text)) == text for every string of bytes,
// valid UTF-8 or not. Ids are below vocabulary(); encode never makes end_of_document().
// A value: copies share what they hold; all methods may run on several threads.
class Tokenizer {
 public:
  // 256 ids for 256 bytes, 256 ends a document.
  static Tokenizer bytes();
  // SentencePiece BPE with byte fallback; equal texts give equal tokenizers. Throws where the
  // texts are too small for, or hold too many distinct characters for, `vocabulary`.
  static Tokenizer train_bpe(std::span<const std::string> texts, int vocabulary);
  // "bytes", what save() wrote, or any SentencePiece model with byte fallback and an end-of-text
  // piece.
  static Tokenizer load(const std::string& path);
  static Tokenizer from_content(std::string content, const std::string& name);
  void save(FileSystem& files, const std::string& path) const;

  TokenizerKind kind() const;
  int vocabulary() const;
  int32_t end_of_document() const;
  void encode(std::string_view text, std::vector<int32_t>& ids) const;  // appends
  std::vector<int32_t> encode(std::string_view text) const;
  std::string decode(std::span<const int32_t> ids) const;  // end_of_document becomes nothing
  std::string description() const;                         // "bpe, vocabulary 4096"
  const std::string& content() const;                      // of the saved file
  std::string digest() const;                              // its sha256

 private:
  struct Impl;
  explicit Tokenizer(std::shared_ptr<const Impl> impl) : impl_(std::move(impl)) {}
  std::shared_ptr<const Impl> impl_;
};

}  // namespace moemamba
