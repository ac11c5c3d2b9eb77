#pragma once
#include <mutex>

#include "parallel/communicator.h"

namespace moemamba {

// The seat of this process in the group of `world_ranks` (ascending, this one among them). Every
// member calls this at the same time. MPI must be started with MPI_THREAD_SERIALIZED or more and
// end after the seat. All MPI calls of the process hold `mpi`: waiting is polling, so nobody holds
// it for long, and MPI is never entered by two threads at a time.
std::unique_ptr<Communicator> make_mpi_communicator(std::shared_ptr<std::mutex> mpi,
                                                    std::vector<int> world_ranks, std::string name,
                                                    std::chrono::milliseconds deadline);

}  // namespace moemamba
