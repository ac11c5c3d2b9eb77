#include "launcher/build_facts.h"

#include <google/protobuf/stubs/common.h>

#include "kernels/cpu/blas_core.h"
#include "kernels/cpu/simd/level.h"
#include "kernels/matmul_tuning.h"

namespace moemamba {

Facts build_facts() {
  Facts facts{{"version", std::string(build_version())},
              {"sources", std::string(build_sources())},
              {"compiler", std::string(build_compiler())},
              {"flags", std::string(build_flags())},
              {"BLAS", blas_core()},
              {"SIMD", name_of(simd_level())}};
  // Which algorithms products take on a GPU, and so their bits.
  if (const std::string digest = matmul_table_digest(); !digest.empty())
    facts.emplace_back("matmul table", digest);
  return facts;
}

std::string version_text() {
  std::string text;
  for (const auto& [name, value] : build_facts())
    text += name == "version" ? "moemamba " + value + "\n" : "  " + name + ": " + value + "\n";
  return text +
         concat("  protobuf: ", google::protobuf::internal::VersionString(GOOGLE_PROTOBUF_VERSION));
}

}  // namespace moemamba
