#pragma once
#include <functional>
#include <memory>
#include <string>

#include "core/file.h"

namespace moemamba {

// The real disk, but for what a test changes: whether it syncs (tests of other things need not wait
// for a disk), and what happens before something is written under a path.
class WrappedFiles : public FileSystem {
 public:
  bool syncs = false;
  std::function<void(const std::string& path)> before_write;  // may throw or wait

  std::unique_ptr<OutputFile> open(const std::string& path, OpenMode mode) override {
    touch(path);
    return std::make_unique<File>(*this, path, real_.open(path, mode));
  }
  void rename(const std::string& from, const std::string& to) override { real_.rename(from, to); }
  void remove(const std::string& path) override { real_.remove(path); }
  void make_folders(const std::string& path) override {
    touch(path);
    real_.make_folders(path);
  }
  void sync_folder(const std::string& path) override {
    if (syncs) real_.sync_folder(path);
  }
  void make_folder(const std::string& path) override {
    touch(path);
    real_.make_folder(path);
  }
  bool rename_new(const std::string& from, const std::string& to) override {
    return real_.rename_new(from, to);
  }
  void link(const std::string& from, const std::string& to) override { real_.link(from, to); }
  int64_t free_bytes(const std::string& path) override { return real_.free_bytes(path); }

 private:
  class File : public OutputFile {
   public:
    File(WrappedFiles& disk, std::string path, std::unique_ptr<OutputFile> real)
        : disk_(disk), path_(std::move(path)), real_(std::move(real)) {}
    void write(const void* data, size_t bytes) override {
      disk_.touch(path_);
      real_->write(data, bytes);
    }
    void write_at(int64_t offset, const void* data, size_t bytes) override {
      real_->write_at(offset, data, bytes);
    }
    void truncate(int64_t bytes) override { real_->truncate(bytes); }
    void sync() override {
      if (disk_.syncs) real_->sync();
    }
    void close() override { real_->close(); }

   private:
    WrappedFiles& disk_;
    std::string path_;
    std::unique_ptr<OutputFile> real_;
  };

  void touch(const std::string& path) {
    if (before_write) before_write(path);
  }
  PosixFileSystem real_;
};

}  // namespace moemamba
