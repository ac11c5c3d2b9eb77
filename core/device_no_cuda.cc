#include "core/gpu.h"
#include "core/stream_impl.h"

namespace moemamba::gpu {

namespace {
[[noreturn]] void refuse() {
  throw Error(
      "this build has no CUDA; configure with the preset cuda-release, or use --device=cpu");
}
}  // namespace

std::vector<Facts> devices(std::string* why_none) {
  if (why_none) *why_none = "this build has no CUDA";
  return {};
}
void use(int) { refuse(); }
int used() { return 0; }
std::string build() { return "no CUDA"; }
std::string architectures() {
  return "";
}
int64_t free_bytes() { refuse(); }
void* allocate(int64_t) { refuse(); }
void release(void*) noexcept {}
void* allocate_pinned(int64_t) { refuse(); }
void release_pinned(void*) noexcept {}
void zero_now(void*, int64_t) { refuse(); }
std::shared_ptr<void> mark(Stream&) { refuse(); }
double seconds_between(const std::shared_ptr<void>&, const std::shared_ptr<void>&) { refuse(); }
std::unique_ptr<Stream::Impl> make_stream() { refuse(); }
void copy_rows(Stream&, const Tensor&, const Tensor&) { refuse(); }
void zero_rows(Stream&, const Tensor&) { refuse(); }

}  // namespace moemamba::gpu
