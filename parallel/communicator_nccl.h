#pragma once
#include "parallel/communicator.h"

namespace moemamba {

// The seat of this process in the NCCL group of `world_ranks` (ascending, two or more, this one
// among them), on the GPU that the calling thread uses. Every member calls this at the same time;
// several groups in the same order on all ranks. All connections are made before it returns, within
// the deadline. An Error in a build without NCCL.
//
// `beside`: a group of the same members over the host. It carries NCCL's unique id, and later the
// aborts, for which NCCL has no way of its own.
//
// Calls come from one thread, on CUDA streams, with memory of the GPU. poll() notices: an abort of
// another member, an error that NCCL met behind the host's back, and a call that has been at work
// on the GPU for longer than the deadline (a member that did not come; of a pair it is known
// which). The group is then torn down, so that its streams run on; if NCCL hangs in that, the
// process ends itself with `exit_code` after two seconds; where the seat's destructor waits for the
// other members, after the deadline if that is longer.
//
// At most 64 calls are on their way: with so many the host waits, its stream's watcher looking, for
// the oldest, so that every call has its deadline.
//
// NCCL reads its environment when the first group is made: see launcher/gpu_environment.h.
std::unique_ptr<Communicator> make_nccl_communicator(std::unique_ptr<Communicator> beside,
                                                     std::vector<int> world_ranks,
                                                     std::chrono::milliseconds deadline,
                                                     int exit_code);

// Of the library that this program has found: "2.21.5"; "" in a build without NCCL.
std::string nccl_version();

}  // namespace moemamba
