#pragma once
#include <string>

namespace moemamba {

// Reads again what rank `rank` of the `ranks` that wrote a checkpoint has written of it (rank 0:
// the small files too), every byte, and as far as the system lets us from the disk and not from the
// memory in which it still has them. An Error names what does not hold.
void reread_own_files(const std::string& path, int rank, int ranks);

}  // namespace moemamba
