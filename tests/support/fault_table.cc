#include "tests/support/fault_table.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "core/error.h"
#include "tests/support/soak.h"

namespace moemamba {

namespace {

std::string three(const std::vector<double>& values, const char* format) {
  std::string text;
  for (double share : {0.5, 0.99, 1.0}) {
    char number[32] = "-";
    if (!values.empty()) std::snprintf(number, sizeof number, format, percentile(values, share));
    char cell[32];
    std::snprintf(cell, sizeof cell, " %7s", number);
    text += cell;
  }
  return text;
}

}  // namespace

double percentile(std::vector<double> values, double share) {
  check(!values.empty(), "a percentile of nothing");
  std::sort(values.begin(), values.end());
  const auto at = size_t(std::max(0.0, std::ceil(share * double(values.size())) - 1));
  return values[std::min(at, values.size() - 1)];
}

void FaultTable::add(const std::string& kind, double found, double next_step, double lost) {
  Kind& of = kinds_[kind];
  ++of.cases;
  if (found >= 0) of.found.push_back(found);
  if (next_step >= 0) of.next_step.push_back(next_step);
  if (lost >= 0) of.lost.push_back(lost);
  std::printf("fault: %s: found %.3f next %.3f lost %.0f seed %llu\n", kind.c_str(), found,
              next_step, lost, static_cast<unsigned long long>(test_seed()));
  std::fflush(stdout);
}

int64_t FaultTable::cases(const std::string& kind) const {
  const auto found = kinds_.find(kind);
  return found == kinds_.end() ? 0 : found->second.cases;
}

int64_t FaultTable::cases() const {
  int64_t all = 0;
  for (const auto& [name, kind] : kinds_) all += kind.cases;
  return all;
}

void FaultTable::print() const {
  std::printf("%-34s %6s  %-24s %-24s %s\n", "", "", " found, s", " next step, s", " steps lost");
  std::printf("%-34s %6s  %8s%8s%8s %8s%8s%8s %8s%8s%8s\n", "fault", "cases", "p50", "p99", "max",
              "p50", "p99", "max", "p50", "p99", "max");
  for (const auto& [name, kind] : kinds_)
    std::printf("%-34s %6lld  %s %s %s\n", name.c_str(), static_cast<long long>(kind.cases),
                three(kind.found, "%.2f").c_str(), three(kind.next_step, "%.2f").c_str(),
                three(kind.lost, "%.0f").c_str());
  for (const auto& [name, kind] : kinds_) report_cases(name, kind.cases);
}

}  // namespace moemamba
