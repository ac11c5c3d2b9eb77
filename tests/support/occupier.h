#pragma once
#include <cstdint>
#include <memory>
#include <string>

namespace moemamba {

// Disturbs the GPU that the calling thread uses: a thread of its own, with a stream of its own,
// launches kernels again and again that hold a random number of multiprocessors for random times
// (10 to 300 us), with random pauses, until the object ends. An Error in a build without CUDA.
class Occupier {
 public:
  explicit Occupier(uint64_t seed);
  ~Occupier();
  int64_t launches() const;
  std::string failure() const;  // of its thread; "" while there is none

 private:
  struct Work;
  std::shared_ptr<Work> work_;
};

}  // namespace moemamba
