#include "launcher/gpu_environment.h"

#include <cstdlib>
#include <string_view>

#include "core/error.h"

namespace moemamba {

void prepare_nccl_environment() {
  constexpr const char* kMulticast = "NCCL_NVLS_ENABLE";
  const char* multicast = std::getenv(kMulticast);
  check(!multicast || std::string_view(multicast) == "0", kMulticast, " is set to \"",
        multicast ? multicast : "", "\"; NVLink multicast stays off: unset it or set it to 0");
  setenv(kMulticast, "0", /*overwrite=*/0);
  setenv("NCCL_LAUNCH_ORDER_IMPLICIT", "1", /*overwrite=*/0);
}

}  // namespace moemamba
