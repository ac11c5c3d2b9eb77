#pragma once
#include <algorithm>
#include <functional>

#include "parallel/expert_exchange.h"
#include "parallel/groups.h"
#include "tests/support/cases.h"

namespace moemamba {

// An exchange whose rows every rank can compute for every other.
struct ExchangeScene {
  int ranks, experts;
  int64_t capacity, width;
  std::function<int(int rank, int expert)> rows;  // how many `rank` sends to `expert`

  int64_t sends(int rank) const {
    int64_t sum = 0;
    for (int e = 0; e < experts; ++e) sum += rows(rank, e);
    return sum;
  }
  int64_t most() const {
    int64_t most = 0;
    for (int r = 0; r < ranks; ++r) most = std::max(most, sends(r));
    return most;
  }
};

// Every rank's rows reach their experts in order, and come back to where they were: by a plan, and
// by one that was kept. On any kind of stream, whose memory is used. Throws where they do not.
void there_and_back(const ExchangeScene& scene, ProcessGroups& groups, Stream& stream);

// The rows and offsets of one rank, on the host.
void fill_rows(const ExchangeScene& scene, int rank, const Tensor& rows, const Tensor& offsets);

}  // namespace moemamba
