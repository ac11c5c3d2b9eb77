#pragma once
#include "runtime/plan.h"

namespace moemamba {

std::string plan_text(const Plan& plan);  // for people

// "80G" and "80GiB" are 80 x 2^30 bytes, "80GB" 80 x 10^9; K, M and T likewise. 0: no size.
int64_t read_bytes(const std::string& text);

}  // namespace moemamba
