#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace moemamba {

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

enum class OpenMode { create, append };  // create: an existing file becomes empty

// All that changes a disk goes through this seam, so that tests can make it fail. Reading does not.
class FileSystem {
 public:
  virtual ~FileSystem() = default;
  virtual std::unique_ptr<OutputFile> open(const std::string& path, OpenMode mode) = 0;
  virtual void rename(const std::string& from, const std::string& to) = 0;
  virtual void remove(const std::string& path) = 0;        // file or empty folder; missing is fine
  virtual void make_folders(const std::string& path) = 0;  // with parents; existing is fine
  virtual void sync_folder(const std::string& path) = 0;   // makes renames in it last
};

class PosixFileSystem : public FileSystem {
 public:
  std::unique_ptr<OutputFile> open(const std::string& path, OpenMode mode) override;
  void rename(const std::string& from, const std::string& to) override;
  void remove(const std::string& path) override;
  void make_folders(const std::string& path) override;
  void sync_folder(const std::string& path) override;
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

// A folder with all that is in it; missing is fine.
void remove_tree(FileSystem& files, const std::string& folder);

void write_file(FileSystem& files, const std::string& path, std::string_view content);  // atomic
std::string read_file(const std::string& path);
bool file_exists(const std::string& path);
std::string folder_of(const std::string& path);  // "." where there is none
std::string join_path(const std::string& folder, const std::string& name);

// A regular file in memory, read-only. It must not shrink while mapped (we only ever rename).
class MappedFile {
 public:
  explicit MappedFile(std::string path);
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

// As 64 hex digits.
std::string sha256(std::string_view data);
std::string sha256_of_file(const std::string& path);

}  // namespace moemamba
