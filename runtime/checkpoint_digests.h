#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "core/device.h"

namespace moemamba {

// Memory that is the next bytes of a file.
struct MemoryRun {
  const char* data;
  size_t bytes;
};

// SHA-256, as 64 hex digits, of files that are written from memory. Several at once on this one
// thread where the processor can do that (kernels/sha256.h).
std::vector<std::string> sha256_of_runs(const std::vector<std::vector<MemoryRun>>& files);

struct StoredFile {
  std::string path;
  int64_t bytes;
};
// Of files on a disk; "" for one of another size. `threads` threads share them out, each reads
// while it hashes, and takes several at once as above: it opens no more than those. An Error where
// one cannot be opened or read.
std::vector<std::string> sha256_of_files(const std::vector<StoredFile>& files, int threads);

// Whether `blocks`, a function like sha256_blocks(), gives OpenSSL's digests for two and for three
// messages. Asked of that one before it is used: what writes a checkpoint and what reads it again
// share it, so that both would agree on what every other program calls damaged.
using Sha256Blocks = FunctionRef<void(int chains, uint32_t* const* states,
                                      const uint8_t* const* data, size_t blocks)>;
bool agrees_with_openssl(Sha256Blocks blocks);

// How many threads for the files of one of so many ranks on a machine of so many cores. Of a rank's
// three files, two are hashed at once on one core, the third on another: sooner done than all three
// on one, of which the other core, which writes and takes the state's hash, has less. Each on its
// own where a core is left for that.
int digest_threads(int ranks, int cores = int(std::thread::hardware_concurrency()));

}  // namespace moemamba
