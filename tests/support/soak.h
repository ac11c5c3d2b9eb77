#pragma once
#include <cstdint>
#include <string>

namespace moemamba {

// What a test program was started with: --soak-seconds N asks every property for about N seconds of
// further cases (0, the default: the quick part alone); --seed S (default 1) draws them. Read from
// the process's own command line, so that no test keeps state.
int64_t soak_seconds();
uint64_t test_seed();

// One line for people and scripts/soak.sh: "cases: P1 atomic: 1234, seed 1".
void report_cases(const std::string& property, int64_t cases);

}  // namespace moemamba
