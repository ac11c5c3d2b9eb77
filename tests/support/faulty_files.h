#pragma once
#include <memory>
#include <string>

#include "core/error.h"
#include "core/file.h"

namespace moemamba {

// A disk that obeys `operations_left` calls and refuses all later ones, or `refusals` of them; a
// refused write leaves half of its bytes behind, as a full disk does. Raise operations_left to
// repair it.
class FaultyFiles : public FileSystem {
 public:
  explicit FaultyFiles(int64_t operations_left = 1 << 30) : operations_left(operations_left) {}
  int64_t operations_left;
  int64_t refusals = 1 << 30;  // then it obeys again
  int64_t operations = 0;      // tried so far

  bool refuses() {
    ++operations;
    return operations_left-- <= 0 && refusals-- > 0;
  }
  void step(const std::string& path) { check(!refuses(), path, ": no space left (injected)"); }

  std::unique_ptr<OutputFile> open(const std::string& path, OpenMode mode) override {
    step(path);
    return std::make_unique<File>(*this, path, real_.open(path, mode));
  }
  void rename(const std::string& from, const std::string& to) override {
    step(from);
    real_.rename(from, to);
  }
  void remove(const std::string& path) override {
    step(path);
    real_.remove(path);
  }
  void make_folders(const std::string& path) override {
    step(path);
    real_.make_folders(path);
  }
  void sync_folder(const std::string& path) override {
    step(path);
    real_.sync_folder(path);
  }

 private:
  class File : public OutputFile {
   public:
    File(FaultyFiles& disk, std::string path, std::unique_ptr<OutputFile> real)
        : disk_(disk), path_(std::move(path)), real_(std::move(real)) {}
    void write(const void* data, size_t bytes) override {
      const bool refused = disk_.refuses();
      real_->write(data, refused ? bytes / 2 : bytes);
      check(!refused, path_, ": no space left (injected)");
    }
    void write_at(int64_t offset, const void* data, size_t bytes) override {
      disk_.step(path_);
      real_->write_at(offset, data, bytes);
    }
    void truncate(int64_t bytes) override {
      disk_.step(path_);
      real_->truncate(bytes);
    }
    void sync() override {
      disk_.step(path_);
      real_->sync();
    }
    void close() override {
      disk_.step(path_);
      real_->close();
    }

   private:
    FaultyFiles& disk_;
    std::string path_;
    std::unique_ptr<OutputFile> real_;
  };
  PosixFileSystem real_;
};

}  // namespace moemamba
