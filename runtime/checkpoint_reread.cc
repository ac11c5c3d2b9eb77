#include "runtime/checkpoint_reread.h"

#include <fcntl.h>
#include <unistd.h>

#include "runtime/checkpoint_parts.h"
#include "runtime/checkpoint_reader.h"

namespace moemamba {

namespace {

// The page cache holds what was written whatever became of it on the disk. Its pages are clean, for
// the file was synced; what cannot be dropped (a file system in memory) is read from there.
void drop_from_memory(const std::string& path) {
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  if (file < 0) return;  // reading it says why
  ::posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);
  ::close(file);
}

bool is_own(const std::string& file, int rank, int ranks) {
  for (const char* what : kShardNames) {
    if (file == shard_name(what, rank, ranks)) return true;
    if (file.rfind(concat(what, "-"), 0) == 0) return false;
  }
  return rank == 0;
}

}  // namespace

void reread_own_files(const std::string& path, int rank, int ranks) {
  drop_from_memory(join_path(path, kManifestName));
  const Checkpoint checkpoint(path);
  std::vector<int> own;
  for (int i = 0; i < checkpoint.manifest().files_size(); ++i) {
    const std::string name(checkpoint.manifest().files(i).name());
    if (!is_own(name, rank, ranks)) continue;
    drop_from_memory(join_path(path, name));
    own.push_back(i);
  }
  checkpoint.verify_files(own, 1);  // training goes on beside it
}

}  // namespace moemamba
