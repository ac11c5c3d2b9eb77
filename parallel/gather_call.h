#pragma once
#include <vector>

#include "parallel/communicator.h"

namespace moemamba {

// An all-gather written as an all-to-all. Holds the four arrays, so that a call allocates nothing;
// filled by the work itself, in the stream's order.
class GatherCall {
 public:
  explicit GatherCall(int size)
      : zeros_(size_t(size)), bytes_(size_t(size)), places_(size_t(size)) {}

  Communicator::AllToAll fill(const void* send, void* recv, int64_t bytes) {
    for (size_t r = 0; r < places_.size(); ++r) {
      bytes_[r] = bytes;
      places_[r] = int64_t(r) * bytes;
    }
    return {.send = send,
            .send_offsets = zeros_.data(),
            .send_bytes = bytes_.data(),
            .recv = recv,
            .recv_offsets = places_.data(),
            .recv_bytes = bytes_.data()};
  }

 private:
  std::vector<int64_t> zeros_, bytes_, places_;
};

}  // namespace moemamba
