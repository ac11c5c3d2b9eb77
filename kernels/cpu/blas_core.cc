#include "kernels/cpu/blas_core.h"

#include <cblas.h>

namespace moemamba {

std::string blas_core() {
  const std::string config = openblas_get_config();  // "OpenBLAS 0.3.21 NO_LAPACKE ..."
  const size_t version_end = config.find(' ', config.find(' ') + 1);
  return config.substr(0, version_end) + " " + openblas_get_corename();
}

}  // namespace moemamba
