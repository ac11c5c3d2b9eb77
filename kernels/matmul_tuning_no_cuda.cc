#include "kernels/matmul_tuning.h"

namespace moemamba {

std::string matmul_table_digest() { return ""; }

std::vector<TuningCase> products_met(Stream&) {
  throw Error("this build has no CUDA: there are no matmul algorithms to tune");
}

void tune_matmul(Stream&, std::span<const TuningCase>, std::ostream&) {
  throw Error("this build has no CUDA: there are no matmul algorithms to tune");
}

}  // namespace moemamba
