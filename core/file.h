#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "core/error.h"

namespace moemamba {

// A file could not be opened or read for a reason that says nothing about its bytes: no descriptor
// or memory left, no right to it, a stale handle.
class Unavailable : public Error {
 public:
  using Error::Error;
};

// A file open for writing. Every failure is an Error that names the path and the system's reason.
class OutputFile {
 public:
  virtual ~OutputFile() = default;                         // closes, silently
  virtual void write(const void* data, size_t bytes) = 0;  // at the end; an Error may leave a part
  // Over bytes that were written before. REQUIRES: opened with create.
  virtual void write_at(int64_t offset, const void* data, size_t bytes) = 0;
  virtual void truncate(int64_t bytes) = 0;
  virtual void sync() = 0;
  virtual void close() = 0;
};

// create: an existing file becomes empty. create_new: it must not exist, nor does a symlink count.
// create_direct: the same, and whole blocks from memory that begins on a block's border go past the
// page cache (O_DIRECT) where the file system can do that; everything else is written as ever.
// create_private: like create_new, and no other user may read it.
enum class OpenMode { create, append, create_new, create_direct, create_private };
constexpr size_t kDirectBlock = 4096;  // no disk asks for more

// All that changes a disk goes through this seam, so that tests can make it fail. Reading does not.
class FileSystem {
 public:
  virtual ~FileSystem() = default;
  virtual std::unique_ptr<OutputFile> open(const std::string& path, OpenMode mode) = 0;
  virtual void rename(const std::string& from, const std::string& to) = 0;
  virtual void remove(const std::string& path) = 0;        // file or empty folder; missing is fine
  virtual void make_folders(const std::string& path) = 0;  // with parents; existing is fine
  virtual void sync_folder(const std::string& path) = 0;   // makes renames in it last
  virtual void make_folder(const std::string& path) = 0;   // it must not exist
  // Fails where `to` exists, whatever it is. False: the file system cannot do that; nothing done.
  virtual bool rename_new(const std::string& from, const std::string& to) = 0;
  virtual void link(const std::string& from, const std::string& to) = 0;  // `to` must not exist
  virtual int64_t free_bytes(const std::string& path) = 0;  // for this user, where `path` lies
};

class PosixFileSystem : public FileSystem {
 public:
  std::unique_ptr<OutputFile> open(const std::string& path, OpenMode mode) override;
  void rename(const std::string& from, const std::string& to) override;
  void remove(const std::string& path) override;
  void make_folders(const std::string& path) override;
  void sync_folder(const std::string& path) override;
  void make_folder(const std::string& path) override;
  bool rename_new(const std::string& from, const std::string& to) override;
  void link(const std::string& from, const std::string& to) override;
  int64_t free_bytes(const std::string& path) override;
};

// A file that appears whole or not at all: written beside `path` as `path.tmp`, renamed by
// commit(). Without commit() the destructor removes what was written.
class AtomicFile {
 public:
  AtomicFile(FileSystem& files, std::string path);
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  ~AtomicFile();
  void write(const void* data, size_t bytes);
  void write(std::string_view text) { write(text.data(), text.size()); }
  void write_at(int64_t offset, const void* data, size_t bytes);  // over bytes written before
  int64_t bytes() const { return bytes_; }
  void commit();

 private:
  void flush();
  FileSystem& files_;
  std::string path_;
  std::string temporary_;
  std::unique_ptr<OutputFile> file_;
  std::string buffer_;
  int64_t bytes_ = 0;
};

// A folder with all that is in it; missing is fine. Of symlinks the link goes, not its target.
void remove_tree(FileSystem& files, const std::string& folder);

// A folder with its parents, of which a power cut then leaves those that were made, as far as the
// system lets us: one above may not be ours to open.
void make_lasting_folders(FileSystem& files, const std::string& path);

void write_file(FileSystem& files, const std::string& path, std::string_view content);  // atomic
std::string read_file(const std::string& path);
bool file_exists(const std::string& path);
void keep_private(const std::string& folder);    // no other user may enter it
std::string folder_of(const std::string& path);  // "." where there is none
std::string join_path(const std::string& folder, const std::string& name);

// What a name may be. Files that the user names may be symlinks; names that a file holds must not.
enum class Links { followed, refused };

// A regular file in memory, read-only. It must not shrink while mapped (we only ever rename).
class MappedFile {
 public:
  explicit MappedFile(std::string path, Links links = Links::followed);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();
  const std::string& path() const { return path_; }
  std::span<const std::byte> bytes() const { return {data_, size_}; }
  std::string_view text() const { return {reinterpret_cast<const char*>(data_), size_}; }

 private:
  std::string path_;
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// A regular file for reading piece by piece; a symlink is not followed. What it throws is
// Unavailable where that is so.
class InputFile {
 public:
  explicit InputFile(std::string path);
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;
  ~InputFile();
  const std::string& path() const { return path_; }
  int64_t bytes() const { return bytes_; }
  void read_at(int64_t offset, void* to, size_t bytes) const;  // all of them, or an Error

 private:
  std::string path_;
  int fd_ = -1;
  int64_t bytes_ = 0;
};

// All of a regular file, of which no symlink is followed. An Error where it is longer than `most`.
std::string read_regular_file(const std::string& path, int64_t most = INT64_MAX);

// SHA-256 piece by piece.
class Sha256 {
 public:
  Sha256();
  Sha256(const Sha256&) = delete;
  Sha256& operator=(const Sha256&) = delete;
  ~Sha256();
  void add(const void* data, size_t bytes);
  void add(std::string_view text) { add(text.data(), text.size()); }
  std::string hex();     // 64 digits; starts anew
  void hex(char* text);  // the same into 64 characters and a zero, without allocating
  // For who takes blocks of 64 bytes in himself (kernels/sha256.h): the eight words that those
  // change, and that there were so many. REQUIRES: what was added before is such blocks, too.
  uint32_t* words();
  void count_blocks(size_t blocks);

 private:
  struct State;
  void start();
  std::unique_ptr<State> state_;
};

// As 64 hex digits.
std::string sha256(std::string_view data);
std::string sha256_of_file(const std::string& path);

}  // namespace moemamba
