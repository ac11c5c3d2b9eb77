#include "core/file.h"

#include <fcntl.h>
#include <openssl/sha.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>
#include <vector>

#include "core/error.h"

namespace moemamba {
namespace {

constexpr size_t kBuffered = 1 << 18;  // AtomicFile writes in pieces of this size

[[noreturn]] void refuse(const std::string& path, const char* what, int reason) {
  throw Error(concat(path, ": cannot ", what, ": ", std::generic_category().message(reason)));
}

// The same of a file that is read.
[[noreturn]] void refuse_reading(const std::string& path, const char* what, int reason) {
  for (int passing : {EMFILE, ENFILE, ENOMEM, EAGAIN, EACCES, EPERM, ESTALE, ETIMEDOUT})
    if (reason == passing)
      throw Unavailable(
          concat(path, ": cannot ", what, ": ", std::generic_category().message(reason)));
  refuse(path, what, reason);
}

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

bool is_whole(const void* data, size_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % kDirectBlock == 0 && bytes >= kDirectBlock;
}

class PosixFile : public OutputFile {
 public:
  // A file that is to be direct is new, and stays so until something else than blocks is written.
  PosixFile(std::string path, int fd, bool direct)
      : path_(std::move(path)), fd_(fd), direct_(direct && set_direct(true)) {}

  void write(const void* data, size_t bytes) override {
    const char* from = static_cast<const char*>(data);
    while (bytes > 0) {
      if (direct_ && !is_whole(from, bytes)) {
        const size_t sent = write_end(from, bytes);
        end_direct();
        from += sent, bytes -= sent;
        continue;
      }
      const size_t part = direct_ ? bytes - bytes % kDirectBlock : bytes;
      const ssize_t done = ::write(fd_.get(), from, part);
      if (done < 0 && errno == EINTR) continue;
      // Larger blocks, or it only looked possible, or memory of a driver.
      if (done < 0 && (errno == EINVAL || errno == EFAULT) && direct_) {
        end_direct();
        continue;
      }
      if (done <= 0) refuse(path_, "write", done < 0 ? errno : ENOSPC);
      from += done;
      bytes -= size_t(done);
    }
  }

  void write_at(int64_t offset, const void* data, size_t bytes) override {
    const char* from = static_cast<const char*>(data);
    while (bytes > 0) {
      const ssize_t done = ::pwrite(fd_.get(), from, bytes, offset);
      if (done < 0 && errno == EINTR) continue;
      if (done <= 0) refuse(path_, "write", done < 0 ? errno : ENOSPC);
      from += done;
      offset += done;
      bytes -= size_t(done);
    }
  }

  void truncate(int64_t bytes) override {
    while (::ftruncate(fd_.get(), bytes) != 0)
      if (errno != EINTR) refuse(path_, "truncate", errno);
  }

  void sync() override {
    if (::fsync(fd_.get()) != 0) refuse(path_, "sync", errno);
  }

  void close() override {
    const int fd = fd_.release();
    if (fd >= 0 && ::close(fd) != 0 && errno != EINTR) refuse(path_, "close", errno);
  }

 private:
  // Whether the system did it. Asked of the open file: an open() that refuses leaves one behind.
  bool set_direct(bool on) {
    const int flags = ::fcntl(fd_.get(), F_GETFL);
    if (flags < 0) return false;
    return ::fcntl(fd_.get(), F_SETFL, on ? flags | O_DIRECT : flags & ~O_DIRECT) == 0;
  }
  // Less than a block, most likely the file's end: as a whole block, whose rest is cut off again.
  // Through the page cache the system would look for its place only when the file is synced, which
  // costs the disk's time. How much was written: all or nothing.
  size_t write_end(const char* data, size_t bytes) {
    if (bytes >= kDirectBlock) return 0;
    const off_t begin = ::lseek(fd_.get(), 0, SEEK_CUR);
    if (begin < 0) refuse(path_, "write", errno);
    alignas(kDirectBlock) char block[kDirectBlock] = {};
    std::memcpy(block, data, bytes);
    const ssize_t done = ::write(fd_.get(), block, kDirectBlock);
    if (done < 0 && errno != EINTR && errno != EINVAL) refuse(path_, "write", errno);
    if (done != ssize_t{kDirectBlock}) bytes = 0;
    truncate(begin + off_t(bytes));
    if (::lseek(fd_.get(), begin + off_t(bytes), SEEK_SET) < 0) refuse(path_, "write", errno);
    return bytes;
  }
  void end_direct() {
    if (!set_direct(false)) refuse(path_, "write", errno);
    direct_ = false;
  }

  std::string path_;
  Descriptor fd_;
  bool direct_;
};

void write_hex(const unsigned char* digest, unsigned bytes, char* text) {
  for (unsigned i = 0; i < bytes; ++i) {
    *text++ = "0123456789abcdef"[digest[i] >> 4];
    *text++ = "0123456789abcdef"[digest[i] & 15];
  }
  *text = 0;
}

}  // namespace

std::unique_ptr<OutputFile> PosixFileSystem::open(const std::string& path, OpenMode mode) {
  const int of_mode = mode == OpenMode::append   ? O_APPEND
                      : mode == OpenMode::create ? O_TRUNC
                                                 : O_EXCL | O_NOFOLLOW;
  const int flags = O_WRONLY | O_CREAT | O_CLOEXEC | of_mode;
  const int fd = ::open(path.c_str(), flags, mode == OpenMode::create_private ? 0600 : 0666);
  if (fd < 0) refuse(path, "open for writing", errno);
  return std::make_unique<PosixFile>(path, fd, mode == OpenMode::create_direct);
}

void PosixFileSystem::rename(const std::string& from, const std::string& to) {
  if (std::rename(from.c_str(), to.c_str()) != 0) refuse(from, ("rename to " + to).c_str(), errno);
}

void PosixFileSystem::remove(const std::string& path) {
  if (std::remove(path.c_str()) != 0 && errno != ENOENT) refuse(path, "remove", errno);
}

void PosixFileSystem::make_folders(const std::string& path) {
  std::error_code error;
  std::filesystem::create_directories(path, error);
  if (error) refuse(path, "make folder", error.value());
}

void PosixFileSystem::sync_folder(const std::string& path) {
  const Descriptor folder(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (folder.get() < 0) refuse(path, "open folder", errno);
  // Some network file systems cannot sync a folder and say so with EINVAL; renames are ordered
  // there.
  if (::fsync(folder.get()) != 0 && errno != EINVAL) refuse(path, "sync folder", errno);
}

void PosixFileSystem::make_folder(const std::string& path) {
  if (::mkdir(path.c_str(), 0777) != 0) refuse(path, "make folder", errno);
}

bool PosixFileSystem::rename_new(const std::string& from, const std::string& to) {
  if (::renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), RENAME_NOREPLACE) == 0) return true;
  if (errno == EINVAL || errno == ENOSYS || errno == ENOTSUP) return false;  // NFS, some Lustre
  refuse(from, ("rename to " + to).c_str(), errno);
}

void PosixFileSystem::link(const std::string& from, const std::string& to) {
  if (::link(from.c_str(), to.c_str()) != 0) refuse(from, ("link as " + to).c_str(), errno);
}

int64_t PosixFileSystem::free_bytes(const std::string& path) {
  struct statvfs about {};
  if (::statvfs(path.c_str(), &about) != 0) refuse(path, "ask for free space", errno);
  return int64_t(about.f_bavail) * int64_t(about.f_frsize);
}

AtomicFile::AtomicFile(FileSystem& files, std::string path)
    : files_(files),
      path_(std::move(path)),
      temporary_(path_ + ".tmp"),
      file_(files.open(temporary_, OpenMode::create)) {
  buffer_.reserve(kBuffered);
}

AtomicFile::~AtomicFile() {
  if (!file_) return;
  file_.reset();
  try {
    files_.remove(temporary_);
  } catch (const Error&) {  // the file system is failing; that is being reported already
  }
}

void AtomicFile::write(const void* data, size_t bytes) {
  check(file_ != nullptr, path_, ": write after commit");
  bytes_ += int64_t(bytes);
  if (buffer_.size() + bytes > kBuffered) flush();
  if (bytes >= kBuffered) {
    file_->write(data, bytes);
  } else {
    buffer_.append(static_cast<const char*>(data), bytes);
  }
}

void AtomicFile::flush() {
  if (!buffer_.empty()) file_->write(buffer_.data(), buffer_.size());
  buffer_.clear();
}

void AtomicFile::write_at(int64_t offset, const void* data, size_t bytes) {
  check(offset >= 0 && offset + int64_t(bytes) <= bytes_, path_, ": write_at past the end");
  flush();
  file_->write_at(offset, data, bytes);
}

void AtomicFile::commit() {
  check(file_ != nullptr, path_, ": committed twice");
  flush();
  file_->sync();
  file_->close();
  files_.rename(temporary_, path_);
  file_.reset();
  files_.sync_folder(folder_of(path_));
}

void write_file(FileSystem& files, const std::string& path, std::string_view content) {
  AtomicFile file(files, path);
  file.write(content);
  file.commit();
}

void make_lasting_folders(FileSystem& files, const std::string& path) {
  std::vector<std::string> extended;  // folders that get a new entry
  for (std::string at = path; !file_exists(at) && at != folder_of(at); at = folder_of(at))
    extended.push_back(folder_of(at));
  files.make_folders(path);
  for (const std::string& folder : extended) {
    try {
      files.sync_folder(folder);
    } catch (const Error&) {  // then it lasts when the system gets to it
    }
  }
}

void remove_tree(FileSystem& files, const std::string& folder) {
  std::error_code missing;
  const auto type = std::filesystem::symlink_status(folder, missing).type();
  if (type == std::filesystem::file_type::symlink) return files.remove(folder);
  if (type != std::filesystem::file_type::directory) return;
  std::vector<std::string> found;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(folder))
    found.push_back(entry.path().string());
  for (size_t i = found.size(); i-- > 0;) files.remove(found[i]);  // children before their folders
  files.remove(folder);
}

std::string read_file(const std::string& path) {
  return std::string(MappedFile(path).text());
}

bool file_exists(const std::string& path) {
  std::error_code error;
  return std::filesystem::exists(path, error);
}

void keep_private(const std::string& folder) {
  if (::chmod(folder.c_str(), 0700) != 0) refuse(folder, "keep others out", errno);
}

std::string folder_of(const std::string& path) {
  const std::string folder = std::filesystem::path(path).parent_path().string();
  return folder.empty() ? "." : folder;
}

std::string join_path(const std::string& folder, const std::string& name) {
  return (std::filesystem::path(folder) / name).string();
}

MappedFile::MappedFile(std::string path, Links links) : path_(std::move(path)) {
  const int no_link = links == Links::refused ? O_NOFOLLOW : 0;
  const Descriptor file(::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | no_link));
  check(file.get() >= 0 || errno != ELOOP || !no_link, path_,
        ": is a symlink; expected the file itself: copy what it points to (cp -L)");
  if (file.get() < 0) refuse(path_, "open", errno);
  struct stat about {};
  if (::fstat(file.get(), &about) != 0) refuse(path_, "read", errno);
  check(S_ISREG(about.st_mode), path_, ": expected a regular file, found ",
        S_ISDIR(about.st_mode) ? "a folder" : "something else");
  size_ = size_t(about.st_size);
  if (size_ == 0) return;  // nothing to map
  void* data = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.get(), 0);
  if (data == MAP_FAILED) refuse(path_, "map", errno);
  data_ = static_cast<const std::byte*>(data);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_) ::munmap(const_cast<std::byte*>(data_), size_);
}

InputFile::InputFile(std::string path) : path_(std::move(path)) {
  Descriptor file(::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW));
  if (file.get() < 0) refuse_reading(path_, "open", errno);
  struct stat about {};
  if (::fstat(file.get(), &about) != 0) refuse_reading(path_, "read", errno);
  check(S_ISREG(about.st_mode), path_, ": expected a regular file");
  bytes_ = int64_t(about.st_size);
  fd_ = file.release();
}

InputFile::~InputFile() {
  ::close(fd_);
}

void InputFile::read_at(int64_t offset, void* to, size_t bytes) const {
  auto* into = static_cast<char*>(to);
  while (bytes > 0) {
    const ssize_t done = ::pread(fd_, into, bytes, offset);
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) refuse_reading(path_, "read", errno);
    check(done > 0, path_, ": cut off at byte ", offset);
    into += done;
    offset += done;
    bytes -= size_t(done);
  }
}

std::string read_regular_file(const std::string& path, int64_t most) {
  const InputFile file(path);
  check(file.bytes() <= most, path, ": has ", file.bytes(), " bytes, expected at most ", most);
  std::string content(size_t(file.bytes()), '\0');
  file.read_at(0, content.data(), content.size());
  return content;
}

// OpenSSL's plain functions: those of its providers allocate for every digest, and steps must not.
struct Sha256::State {
  SHA256_CTX context;
};

Sha256::Sha256() : state_(std::make_unique<State>()) {
  start();
}

Sha256::~Sha256() = default;

void Sha256::start() {
  check(SHA256_Init(&state_->context) == 1, "SHA-256 failed; is OpenSSL complete?");
}

void Sha256::add(const void* data, size_t bytes) {
  check(SHA256_Update(&state_->context, data, bytes) == 1, "SHA-256 failed; is OpenSSL complete?");
}

uint32_t* Sha256::words() {
  static_assert(std::is_same_v<decltype(state_->context.h[0]), uint32_t&>);
  return state_->context.h;
}

void Sha256::count_blocks(size_t blocks) {
  SHA256_CTX& context = state_->context;
  check(context.num == 0, "SHA-256: expected whole blocks, found ", context.num, " bytes more");
  const uint64_t bits = (uint64_t(context.Nh) << 32 | context.Nl) + uint64_t(blocks) * 512;
  context.Nl = uint32_t(bits);
  context.Nh = uint32_t(bits >> 32);
}

void Sha256::hex(char* text) {
  unsigned char digest[SHA256_DIGEST_LENGTH];
  check(SHA256_Final(digest, &state_->context) == 1, "SHA-256 failed; is OpenSSL complete?");
  start();
  write_hex(digest, sizeof digest, text);
}

std::string Sha256::hex() {
  char text[65];
  hex(text);
  return text;
}

std::string sha256(std::string_view data) {
  Sha256 digest;
  digest.add(data);
  return digest.hex();
}

std::string sha256_of_file(const std::string& path) {
  return sha256(MappedFile(path).text());
}

}  // namespace moemamba
