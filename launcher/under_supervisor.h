#pragma once
#include <functional>
#include <memory>

#include "core/device.h"
#include "launcher/agent.h"
#include "launcher/run_config.pb.h"
#include "parallel/groups.h"
#include "runtime/commands.h"

namespace moemamba {

// A rank of `train` that moemamba launch has started.

// Its agent, once the supervisor has taken this rank in; what earlier attempts have left on this
// machine, processes and Open MPI's files, is gone then (its first rank sees to it, before MPI
// starts). Null: there is no
// supervisor. stop: as Agent's.
std::unique_ptr<Agent> join_supervisor(const RunConfig& config, std::function<void()> stop);

// The training tells the agent what it does, and writes under the supervisor's lease. Null:
// nothing. REQUIRES: the agent outlives the request.
void report_to(Agent* agent, const ProcessGroups& groups, TrainRequest& request);

// Runs `work`, which returns whether the training was stopped before its end; whatever becomes of
// it is the agent's last word. Null: runs it.
bool run_with_goodbye(Agent* agent, FunctionRef<bool()> work);

}  // namespace moemamba
