#pragma once
#include <optional>
#include <vector>

#include "core/file.h"

namespace moemamba {

// megatron: PATH.bin and PATH.idx; llmc: one .bin with a header of 256 words; raw_u16: nanoGPT's
// .bin, 16-bit ids and nothing else (read only).
enum class TokenFormat { megatron, llmc, raw_u16 };

// Tokens on disk, mapped. Opening checks header, sizes and offsets, not the ids.
class TokenFile {
 public:
  // `path` with or without .bin. Where no format is given: megatron if PATH.idx is there, llmc if
  // the magic number fits, otherwise raw_u16. Unreadable, empty, truncated, too long: Error.
  explicit TokenFile(const std::string& path, std::optional<TokenFormat> format = {});

  TokenFormat format() const { return format_; }
  const std::string& path() const { return tokens_.path(); }
  int64_t size() const { return size_; }
  // Ids of tokens [position, position + count); one that does not fit an int32 reads as -1.
  void read(int64_t position, int64_t count, int32_t* out) const;
  // "train.bin, token 17 (byte 34)"
  std::string place(int64_t position) const;

  // Documents that the file itself tells of (megatron); 0 for the other formats, where only an
  // end-of-document id separates them.
  int64_t documents() const { return documents_; }
  int64_t document_begin(int64_t document) const;  // documents() is allowed: the end of the last

  // Of tokens [position, position + count): 1 where one is the first of a document, else 0. A
  // document begins with the file, after an `end_of_document` id (-1: the tokens have none), and
  // where the file's own index says so.
  void mark_starts(int64_t position, int64_t count, int32_t end_of_document, uint8_t* starts) const;

 private:
  void open_megatron(const std::string& stem);
  void check_megatron_sequences();
  int64_t width_bytes() const;
  void open_llmc();
  TokenFormat format_;
  MappedFile tokens_;
  std::optional<MappedFile> index_;
  enum class Width : uint8_t { u8 = 1, i8 = 2, i16 = 3, i32 = 4, i64 = 5, u16 = 8, u32 = 100 };
  Width width_ = Width::u16;
  int64_t header_ = 0;  // bytes before the first token
  int64_t size_ = 0;
  int64_t sequences_ = 0;
  int64_t documents_ = 0;
};

// Writes one token file; ids are u16 where the vocabulary is below 65,500, else 32 bits wide.
// llmc knows two vocabularies' magic numbers only: u16 (GPT-2's) and u32 (Llama 3's).
class TokenWriter {
 public:
  TokenWriter(FileSystem& files, const std::string& path, TokenFormat format, int64_t vocabulary);
  // `ids` ends with the end-of-document id where one is wanted.
  void add_document(std::span<const int32_t> ids);
  int64_t size() const { return size_; }
  void commit();  // REQUIRES: at least one token

 private:
  void write_index();
  FileSystem& files_;
  std::string stem_;
  TokenFormat format_;
  int64_t vocabulary_;
  bool wide_;
  AtomicFile tokens_;
  std::vector<int64_t> lengths_;
  std::vector<uint16_t> narrow_;
  int64_t size_ = 0;
};

}  // namespace moemamba
