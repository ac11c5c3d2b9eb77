#include "core/error.h"

#include <cstring>

namespace moemamba {

PeerLost::PeerLost(std::string group, int rank, const std::string& why)
    : Error(rank >= 0 ? concat("group ", group, ": rank ", rank, ": ", why)
                      : concat("group ", group, ": ", why)),
      group_(std::move(group)),
      rank_(rank) {}

void fail(const Condition& where, const std::string& message) {
  const char* name = std::strrchr(where.file, '/');
  throw Error(concat(message, "  [", name ? name + 1 : where.file, ":", where.line, "]"));
}

}  // namespace moemamba
