#pragma once
#include "parallel/communicator.h"
#include "parallel/layout.h"

namespace moemamba {

// The communicators of one rank, one for each purpose that may be in flight at the same time.
// Passed by reference, never global. Groups of one are there too: nothing asks how many ranks.
struct ProcessGroups {
  RankLayout layout;
  int rank;                                      // in the world
  int ranks_of_machine = 1;                      // that share this one's cores, it too
  DeviceKind device = DeviceKind::cpu;           // where `data`, `expert_data`, `expert` work
  std::unique_ptr<Communicator> data;            // all ranks: gradients of dense parameters
  std::unique_ptr<Communicator> expert_data;     // gradients of expert parameters
  std::unique_ptr<Communicator> expert;          // token exchange
  std::unique_ptr<Communicator> control;         // all ranks: small facts (losses, verdicts)
  std::unique_ptr<Communicator> checkpoint;      // all ranks: votes of a save behind the steps
  Activity* activity = nullptr;                  // what this rank is at; null: nobody reads
  // Tells all of them, and what is made of them, to write down what they are at.
  void tell(Activity* activity);
  // While the host waits for a CUDA stream, which cannot throw by itself:
  //   stream.watch([&groups] { groups.poll(); });
  // Throws PeerLost where a member of a group of the step is lost, after it has told all others, so
  // that no stream hangs on its way out.
  void poll();
  void abort(const std::string& why) noexcept;   // of all five
};

// One entry a rank, for ranks that are threads of this process.
std::vector<ProcessGroups> make_thread_groups(const RankLayout& layout,
                                              std::chrono::milliseconds deadline);

// The seats of one rank of a layout that does not run: for plans on dry streams. Any call throws.
ProcessGroups make_planned_groups(const RankLayout& layout, int rank);

}  // namespace moemamba
