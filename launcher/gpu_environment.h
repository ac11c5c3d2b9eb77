#pragma once

namespace moemamba {

// Settings of NCCL that hold for every run, put into this process's environment where they are
// absent. Called once, before any thread is started and before the first group of a GPU run.
//   NCCL_NVLS_ENABLE=0            no NVLink multicast: it can put a shared host's GPUs out of
//                                 service. An Error where the environment says otherwise.
//   NCCL_LAUNCH_ORDER_IMPLICIT=1  calls of several groups run in the order in which the one host
//                                 thread makes them, so that no two wait for each other.
void prepare_nccl_environment();

}  // namespace moemamba
