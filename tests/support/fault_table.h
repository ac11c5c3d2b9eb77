#pragma once
#include <map>
#include <string>
#include <vector>

#include "tests/support/launched.h"

namespace moemamba {

// What faults of each kind did to runs: for people a table, and for scripts/soak.sh a line a fault.
class FaultTable {
 public:
  // Prints the line. What is negative was not measured.
  void add(const std::string& kind, double found, double next_step, double lost);
  void add(const std::string& kind, const Outcome& outcome) {
    add(kind, outcome.found, outcome.next_step, double(outcome.lost));
  }
  int64_t cases(const std::string& kind) const;
  int64_t cases() const;
  // The table, and report_cases() of each kind.
  void print() const;

 private:
  struct Kind {
    int64_t cases = 0;
    std::vector<double> found, next_step, lost;
  };
  std::map<std::string, Kind> kinds_;
};

// The value that a share of them does not exceed. REQUIRES: values.
double percentile(std::vector<double> values, double share);

}  // namespace moemamba
