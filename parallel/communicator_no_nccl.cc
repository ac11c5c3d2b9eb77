#include "parallel/communicator_nccl.h"

namespace moemamba {

std::unique_ptr<Communicator> make_nccl_communicator(std::unique_ptr<Communicator> beside,
                                                     std::vector<int>, std::chrono::milliseconds,
                                                     int) {
  throw Error(concat("group ", beside->name(), ": this build has no NCCL, so a GPU run has one ",
                     "rank; install NCCL and configure again, or use --device=cpu"));
}

std::string nccl_version() { return ""; }

}  // namespace moemamba
