#pragma once
#include <string>
#include <vector>

#include "core/device.h"

// All that the house knows of a GPU outside of kernels and NCCL. core/device_cuda.cc has it; in a
// build without CUDA core/device_no_cuda.cc says that there is none. Errors name the call.
namespace moemamba::gpu {

struct Facts {
  std::string name;     // as the driver gives it
  int64_t bytes = 0;    // of its memory
  int multiprocessors = 0;
  int capability = 0;   // 90: compute capability 9.0
  std::string uuid;     // no other GPU has it; in hexadecimal
};

// The GPUs that this process sees; none and the reason where there is no driver, no GPU or no CUDA
// in this build, or where asking for them fails in any way.
std::vector<Facts> devices(std::string* why_none = nullptr);
// From here on the calling thread uses this one.
void use(int ordinal);
int used();  // by the calling thread
std::string build();  // "CUDA 13.0", or "no CUDA"
std::string architectures();  // that this build has kernels for: "80-real 90a"; "" without CUDA

int64_t free_bytes();  // of the used one's memory, not taken by anybody
void* allocate(int64_t bytes);         // not zeroed; Error that names bytes and free memory
void release(void* memory) noexcept;
void* allocate_pinned(int64_t bytes);  // of the host, and the GPU copies to it without detour
void release_pinned(void* memory) noexcept;
void zero_now(void* memory, int64_t bytes);  // done when it returns

// A moment of a CUDA stream's work, to measure by; waits for nothing.
std::shared_ptr<void> mark(Stream& stream);
// Between two of them; the host waits for the later one.
double seconds_between(const std::shared_ptr<void>& from, const std::shared_ptr<void>& to);

std::unique_ptr<Stream::Impl> make_stream();
// Between any two places that both sides can reach; behind the stream's earlier work.
void copy_rows(Stream& stream, const Tensor& from, const Tensor& to);
void zero_rows(Stream& stream, const Tensor& to);

}  // namespace moemamba::gpu
