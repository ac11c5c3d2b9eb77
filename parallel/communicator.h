#pragma once
#include <chrono>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/activity.h"
#include "core/device.h"

namespace moemamba {

// One rank's seat in one group. Every member makes the same calls in the same order, each on a
// stream; a call is enqueued and does not wait for the others. A group of one copies. Every wait
// has a deadline and throws PeerLost{group, rank if known}; a member that fails calls abort(), and
// all others throw PeerLost instead of waiting. Threads are the reference implementation; MPI and
// NCCL pass the same suite.
//
// On a CUDA stream: groups of threads take memory of the GPU and of the host; NCCL's of the GPU
// alone; MPI's of the host alone, and since a task of a CUDA stream runs on the host at once, what
// they send must be there by then, and the host waits in the call.
class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual const std::string& name() const = 0;

  // Rank r gets send_bytes[r] bytes at send + send_offsets[r]; what it sends lands at
  // recv + recv_offsets[r], recv_bytes[r] bytes. Counts must match on both sides (checked: an Error
  // naming both ranks and counts). Pointers and the four arrays (size() each) must stay valid until
  // the call is done. What is sent and what is received must not overlap. (Not checked by NCCL:
  // there a mismatch ends at the deadline. The exchange of rows agrees on its counts beforehand.)
  struct AllToAll {
    const void* send;
    const int64_t* send_offsets;
    const int64_t* send_bytes;
    void* recv;
    const int64_t* recv_offsets;
    const int64_t* recv_bytes;
  };
  virtual void all_to_all(Stream& stream, const AllToAll& call) = 0;

  // recv[r * bytes ..) = rank r's `bytes` at send. In place: send == recv + rank() * bytes.
  virtual void all_gather(Stream& stream, const void* send, void* recv, int64_t bytes) = 0;

  // Throws PeerLost where a member is known to be lost or a call is late; cheap, from any thread.
  // A host that waits for a CUDA stream polls the groups whose work that stream may hold
  // (Stream::watch); on other streams the calls themselves throw.
  virtual void poll() {}

  // This rank failed: wakes all the others. Called once, from any thread.
  virtual void abort(const std::string& why) noexcept = 0;

  // Who is told of this seat's calls, before the first of them; null: nobody, as at first. waits:
  // the thread that trains waits for them, and does not go on beside them.
  void tell(Activity* activity, bool waits);
  Activity* activity() const { return activity_; }

 protected:
  // From a call's begin to its end: while it is at work, not while it is enqueued.
  void begin_call() const {
    if (activity_) activity_->begin_collective(group_of_activity_);
  }
  void end_call(std::chrono::nanoseconds took) const {
    if (!activity_) return;
    if (waits_) activity_->add_waited(took);
    activity_->end_collective(group_of_activity_);
  }
  class InCall;  // both, on the thread that does the work

 private:
  Activity* activity_ = nullptr;
  int group_of_activity_ = 0;
  bool waits_ = false;
};

class Communicator::InCall {
 public:
  explicit InCall(const Communicator& seat) : seat_(seat) {
    if (!seat.activity_) return;
    start_ = std::chrono::steady_clock::now();
    seat.begin_call();
  }
  ~InCall() {
    if (seat_.activity_) seat_.end_call(std::chrono::steady_clock::now() - start_);
  }
  InCall(const InCall&) = delete;
  InCall& operator=(const InCall&) = delete;

 private:
  const Communicator& seat_;
  std::chrono::steady_clock::time_point start_;
};

// Sums over the ranks in rank order: the same bits on every member and for every implementation.
// values[i] of all ranks are added; on return (of the stream) each rank holds the sums.
// `workspace`: size() * bytes. f32, f64 or i64; both tensors where the group's memory is.
void all_reduce_sum(Communicator& group, Stream& stream, const Tensor& values, Tensor workspace);

// Everybody reached this point.
void barrier(Communicator& group, Stream& stream);

// The seats of `size` threads of this process: seats[i] belongs to thread i. world_ranks: what
// PeerLost calls the members, 0 .. size - 1 where not given.
std::vector<std::unique_ptr<Communicator>> make_thread_group(
    int size, std::string name, std::chrono::milliseconds deadline,
    std::vector<int> world_ranks = {});

}  // namespace moemamba
