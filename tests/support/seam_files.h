#pragma once
#include <functional>
#include <memory>
#include <string>

#include "core/file.h"

namespace moemamba {

enum class Call : uint8_t {
  open,
  write,
  write_at,
  truncate,
  sync,
  close,
  rename,
  remove,
  make_folders,
  sync_folder,
  make_folder,
  rename_new,
  link,
  free_bytes
};

// One call of the seam. A hook may lower `bytes` of a write, which then writes that much.
struct FileCall {
  Call what;
  std::string path, to;
  const void* data = nullptr;
  size_t bytes = 0;
  int64_t offset = 0;
  OpenMode mode = OpenMode::create;
};

// The real disk, with a hook on both sides of every call: to count, kill, refuse, drop or record.
class SeamFiles : public FileSystem {
 public:
  std::function<bool(FileCall&)> before;  // false: the call is left out, and looks done
  std::function<void(const FileCall&)> after;
  bool renames_new = true;  // false: as a file system without RENAME_NOREPLACE

  std::unique_ptr<OutputFile> open(const std::string& path, OpenMode mode) override {
    std::unique_ptr<OutputFile> file;
    around({.what = Call::open, .path = path, .to = {}, .mode = mode},
           [&](const FileCall&) { file = real_.open(path, mode); });
    return std::make_unique<File>(*this, path, std::move(file));
  }
  void rename(const std::string& from, const std::string& to) override {
    around({.what = Call::rename, .path = from, .to = to},
           [&](const FileCall&) { real_.rename(from, to); });
  }
  void remove(const std::string& path) override {
    around({.what = Call::remove, .path = path, .to = {}},
           [&](const FileCall&) { real_.remove(path); });
  }
  void make_folders(const std::string& path) override {
    around({.what = Call::make_folders, .path = path, .to = {}},
           [&](const FileCall&) { real_.make_folders(path); });
  }
  void sync_folder(const std::string& path) override {
    around({.what = Call::sync_folder, .path = path, .to = {}},
           [&](const FileCall&) { real_.sync_folder(path); });
  }
  void make_folder(const std::string& path) override {
    around({.what = Call::make_folder, .path = path, .to = {}},
           [&](const FileCall&) { real_.make_folder(path); });
  }
  bool rename_new(const std::string& from, const std::string& to) override {
    if (!renames_new) return false;
    bool done = true;
    around({.what = Call::rename_new, .path = from, .to = to},
           [&](const FileCall&) { done = real_.rename_new(from, to); });
    return done;
  }
  void link(const std::string& from, const std::string& to) override {
    around({.what = Call::link, .path = from, .to = to},
           [&](const FileCall&) { real_.link(from, to); });
  }
  int64_t free_bytes(const std::string& path) override {
    int64_t bytes = 0;
    around({.what = Call::free_bytes, .path = path, .to = {}},
           [&](const FileCall&) { bytes = real_.free_bytes(path); });
    return bytes;
  }

 private:
  class File : public OutputFile {
   public:
    File(SeamFiles& disk, std::string path, std::unique_ptr<OutputFile> real)
        : disk_(disk), path_(std::move(path)), real_(std::move(real)) {}
    void write(const void* data, size_t bytes) override {
      disk_.around({.what = Call::write, .path = path_, .to = {}, .data = data, .bytes = bytes},
                   [&](const FileCall& call) { real_->write(call.data, call.bytes); });
    }
    void write_at(int64_t offset, const void* data, size_t bytes) override {
      disk_.around({.what = Call::write_at,
                    .path = path_,
                    .to = {},
                    .data = data,
                    .bytes = bytes,
                    .offset = offset},
                   [&](const FileCall& call) { real_->write_at(offset, call.data, call.bytes); });
    }
    void truncate(int64_t bytes) override {
      disk_.around({.what = Call::truncate, .path = path_, .to = {}, .offset = bytes},
                   [&](const FileCall&) { real_->truncate(bytes); });
    }
    void sync() override {
      disk_.around({.what = Call::sync, .path = path_, .to = {}},
                   [&](const FileCall&) { real_->sync(); });
    }
    void close() override {
      disk_.around({.what = Call::close, .path = path_, .to = {}},
                   [&](const FileCall&) { real_->close(); });
    }

   private:
    SeamFiles& disk_;
    std::string path_;
    std::unique_ptr<OutputFile> real_;
  };

  template <class Work>
  void around(FileCall call, Work&& work) {
    if (!before || before(call)) work(call);
    if (after) after(call);
  }
  PosixFileSystem real_;
};

}  // namespace moemamba
