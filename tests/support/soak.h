#pragma once
#include <cstdint>

namespace moemamba {

// --soak-seconds N: how long each long part of a test may go on; 0: there are only quick parts.
int64_t soak_seconds();
// --seed S of all that tests draw; 1 unless told.
uint64_t test_seed();

}  // namespace moemamba
