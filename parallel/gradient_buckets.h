#pragma once
#include <atomic>
#include <vector>

#include "core/arena.h"
#include "parallel/communicator.h"

namespace moemamba {  // letters: P elements of a bucket (a multiple of the group), N ranks

// Gradient reduction and weight gathering behind the computation. A bucket is one flat run of f32
// parameters of one block and one group; rank r of the group owns elements [r P/N, (r + 1) P/N).
//
// ready(i): the bucket's local gradient is complete. On the communication stream each rank sends
// the others their slices and adds what it gets in rank order (reduce-scatter as all-to-all plus
// ordered sum, so that the bits do not depend on any library); the sum lands in the rank's own
// slice of the gradient buffer. Buckets become ready in the same order on all ranks.
class GradientBuckets {
 public:
  struct Bucket {
    Tensor gradient;  // [P] f32
    Tensor value;     // [P] f32
    Communicator* group;
    std::string name;
  };
  // REQUIRES: P divisible by the group's size. Memory for the largest bucket is taken here.
  GradientBuckets(std::vector<Bucket> buckets, Stream& communication);
  static int64_t buffer_bytes(const std::vector<Bucket>& buckets);  // that memory

  int64_t size() const { return int64_t(buckets_.size()); }
  const Bucket& bucket(int64_t i) const { return buckets_[size_t(i)]; }
  Tensor owned_gradient(int64_t i) const;  // [P / N] of this rank
  Tensor owned_value(int64_t i) const;

  void ready(int64_t i, Stream& compute);  // compute: the gradient is complete there
  void finish(Stream& compute);            // compute waits until all ready buckets are reduced
  // After the optimizer: all-gathers the new values of every bucket, in order, behind `compute`.
  void gather_weights(Stream& compute);
  // compute waits until bucket i's new values are there (no wait before the first gather).
  void wait_weights(int64_t i, Stream& compute);
  int64_t buffer_bytes() const { return receive_.bytes(); }
  // Seconds that the communication stream spent in reductions and gathers since the last call; 0 on
  // a CUDA stream, whose work the host does not see.
  double take_seconds();

 private:
  struct Places {  // of the slices of all ranks within a bucket, in bytes; the own one is not sent
    std::vector<int64_t> offsets, bytes;
  };
  void wait(Event event, Stream& compute);
  void start_clock();
  void stop_clock();

  std::vector<Bucket> buckets_;
  std::vector<Places> places_;
  std::vector<Event> gathered_;
  Stream& communication_;
  Event last_;
  Buffer receive_;
  std::chrono::steady_clock::time_point started_;  // touched by the communication stream alone
  std::atomic<int64_t> nanoseconds_{0};
};

}  // namespace moemamba
