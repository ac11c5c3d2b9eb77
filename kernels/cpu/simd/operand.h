#pragma once
#include <cstdint>

namespace moemamba {

// The rows of a tensor as plain addresses, `stride` floats from one to the next. No data: absent.
struct Source {
  const float* data;
  int64_t stride;
};
struct Target {
  float* data;
  int64_t stride;
};

}  // namespace moemamba
