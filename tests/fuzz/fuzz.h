#pragma once
#include <sanitizer/allocator_interface.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>

#include "core/error.h"

namespace moemamba {

// What fuzz targets (libFuzzer, docs/testing.md) have in common.

// The process ends here, and libFuzzer keeps the input.
inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "expected: %s\n", what);
  std::abort();
}

// Files of this process, in memory where the system has such a folder; gone when it ends.
class FuzzFolder {
 public:
  FuzzFolder() {
    const char* base = std::filesystem::is_directory("/dev/shm") ? "/dev/shm" : "/tmp";
    path_ = concat(base, "/moemamba-fuzz-", getpid());
    std::filesystem::create_directories(path_);
  }
  ~FuzzFolder() { std::filesystem::remove_all(path_); }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }
  void put(const std::string& name, std::string_view content) const {
    std::ofstream(*this / name, std::ios::binary | std::ios::trunc) << content;
  }

 private:
  std::string path_;
};

// While one lives: what the program allocates for an input of `bytes`, by the sanitizer's count. At
// its end: never was more alive than `times` the input and `more` bytes, which are for what no
// input makes larger: texts of errors, a path, lists of fixed length. One at a time, on one thread.
class AllocationLimit {
 public:
  explicit AllocationLimit(size_t bytes, int64_t times = 2, int64_t more = 16 << 10)
      : most_(times * int64_t(bytes) + more), bytes_(int64_t(bytes)) {
    static const int installed = __sanitizer_install_malloc_and_free_hooks(&took, &gave);
    require(installed > 0, "hooks of the sanitizer's allocator");
    Counts& c = counts();
    c.live = c.peak = 0;
    c.watching = true;
  }
  void allow(int64_t more) { most_ += more; }
  ~AllocationLimit() {
    Counts& c = counts();
    c.watching = false;
    if (c.peak <= most_) return;
    std::fprintf(stderr, "%lld bytes of input: %lld bytes alive at once, at most %lld may be\n",
                 static_cast<long long>(bytes_), static_cast<long long>(c.peak),
                 static_cast<long long>(most_));
    require(false, "allocations within bounds");
  }

 private:
  struct Counts {
    std::atomic<bool> watching = false;
    int64_t live = 0, peak = 0;
  };
  static Counts& counts() {
    static Counts counts;
    return counts;
  }
  static void took(const volatile void*, size_t bytes) {
    Counts& c = counts();
    if (!c.watching) return;
    c.live += int64_t(bytes);
    c.peak = std::max(c.peak, c.live);
  }
  static void gave(const volatile void* address) {
    Counts& c = counts();
    if (c.watching && address)
      c.live -= int64_t(__sanitizer_get_allocated_size(const_cast<const void*>(address)));
  }
  int64_t most_, bytes_;
};

}  // namespace moemamba

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
