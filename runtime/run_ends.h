#pragma once
#include "core/error.h"

namespace moemamba {

// A training that is not to be started again as it is: its settings say so, or what it would go on
// from needs a person. Another attempt would meet the same.
class RunEnds : public Error {
 public:
  using Error::Error;
};

}  // namespace moemamba
