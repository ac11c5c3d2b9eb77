#pragma once
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "parallel/groups.h"

namespace moemamba {

// Facts that must be equal on all ranks: (name, value), for example lines of the configuration and
// the build.
using Facts = std::vector<std::pair<std::string, std::string>>;

// "" when all ranks' facts are equal; else which facts differ, on which ranks, and their values.
std::string describe_differences(const std::vector<Facts>& of_ranks);

// The MPI library that this program has found, "Open MPI v4.1.4"; known before MPI starts.
std::string mpi_library();
// Starts MPI, asks for everything, ends it, and says what threads may do: "MPI_THREAD_MULTIPLE".
// `enough`: a World can be made of it. Once in a process, and in no other process than one that may
// die of it.
std::string mpi_thread_level(bool* enough);

// MPI between its start and its end: one object in a process, for as long as communicators live.
// Whoever catches an error ends the job with abort(): a destructor that runs because of an
// exception leaves MPI unfinished, so that mpirun ends the other ranks instead of all waiting.
class World {
 public:
  World();
  ~World();
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }
  int node_rank() const { return node_rank_; }  // among the ranks of this machine
  int node_size() const { return node_size_; }
  const std::string& hostname() const { return hostname_; }

  // Before anything else: an Error on every rank unless all have the same facts; it names the
  // facts, the ranks and their values.
  void agree(const Facts& facts, std::chrono::milliseconds deadline);
  // Every rank calls this at the same time. device: where `data`, `expert_data` and `expert` work;
  // on GPUs (choose_gpu() comes first) they are NCCL's, the others stay with MPI on the host.
  // stuck_exit_code: what a process ends with whose GPU cannot be freed from a lost group; the
  // default is the one that means "start me again".
  ProcessGroups make_groups(const RankLayout& layout, std::chrono::milliseconds deadline,
                            DeviceKind device = DeviceKind::cpu, int stuck_exit_code = 75);
  // Every rank calls this at the same time: the calling thread uses this rank's GPU from here on,
  // one that no other rank takes; returns which of those that it sees (parallel/gpu_choice.h).
  // visible: CUDA_VISIBLE_DEVICES, for the message where there are too few; "" if it is not set.
  int choose_gpu(const std::string& visible, std::chrono::milliseconds deadline);
  [[noreturn]] void abort(int exit_code) noexcept;  // ends all ranks

 private:
  std::unique_ptr<Communicator> make_group(const char* name, std::vector<int> members,
                                           std::chrono::milliseconds deadline);
  std::unique_ptr<Communicator> make_gpu_group(const char* name, std::vector<int> members,
                                               std::chrono::milliseconds deadline, int exit_code);
  std::shared_ptr<std::mutex> mpi_ = std::make_shared<std::mutex>();
  int rank_ = 0, size_ = 1, node_rank_ = 0, node_size_ = 1;
  int exceptions_;
  std::string hostname_;
};

}  // namespace moemamba
