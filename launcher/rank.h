#pragma once
#include "core/device.h"
#include "launcher/run_config.pb.h"
#include "parallel/world.h"

namespace moemamba {

// One rank of a command. REQUIRES: settings that fit the ranks (read_settings).
struct Rank {
  World& world;
  ProcessGroups& groups;
  int threads;  // of this rank
};

// Starts MPI, compares settings and build with all other ranks before anything else, makes the
// groups and calls `work`. If it throws, the other ranks are woken and told why. activity: is told
// what this rank is at; null: nobody is.
void run_rank(const RunConfig& config, FunctionRef<void(Rank&)> work,
              Activity* activity = nullptr);

}  // namespace moemamba
