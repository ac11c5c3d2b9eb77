#pragma once
#include <string>
#include <vector>

#include "parallel/groups.h"
#include "runtime/session.h"

namespace moemamba {

struct ExchangeBenchOptions {
  std::vector<double> megabytes = {1, 4, 16, 32, 64, 256};  // that leave a rank, 10^6 bytes each
  int64_t repeat = 20;
  double exchange_rows = 1.25;  // room of one chunk, as in training
  int threads = 1;              // of this rank
};

struct ExchangeBench {
  struct Row {
    const char* routing;
    int64_t chunks;
    double bytes;  // that leave the rank that sends the most in dispatch; combine brings them back
    // Medians, of the slowest rank: sharing the counts, rows to their experts, back again, and the
    // plain all-to-all of what dispatch sends.
    double plan, dispatch, combine, plain;
  };
  std::string what;  // which ranks, experts and rows
  std::vector<Row> rows;
};

// Rows of the model's width and dtype through the expert exchange, over the groups as they are:
// shared out evenly over the experts, and all of them to the last one. Every rank calls it. Throws
// where fewer than two ranks share the experts.
ExchangeBench bench_exchange(ProcessGroups& groups, const ModelSizes& sizes,
                             const ExchangeBenchOptions& options);

// A table for people.
std::string exchange_bench_text(const ExchangeBench& bench);

}  // namespace moemamba
