#include <cuda_runtime.h>

#include <array>
#include <chrono>
#include <thread>

#include "core/digest.h"
#include "core/gpu.h"
#include "core/stream_impl.h"

namespace moemamba::gpu {

namespace {

void call(cudaError_t code, const char* what) {
  check(code == cudaSuccess, "CUDA: ", what, ": ", cudaGetErrorString(code), " (",
        cudaGetErrorName(code), ")");
}

// Events are a ring: whoever waits for a ticket that has been recorded over waits for a later one.
constexpr uint64_t kRing = 256;

struct CudaStream : Stream::Impl {
  CudaStream() {
    call(cudaGetDevice(&ordinal), "cudaGetDevice");
    call(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    for (cudaEvent_t& event : ring)
      call(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
  }
  ~CudaStream() override {
    cudaStreamSynchronize(stream);
    scratch = Buffer();
    attachment.reset();
    for (cudaEvent_t event : ring) cudaEventDestroy(event);
    cudaStreamDestroy(stream);
  }
  DeviceKind device() const override { return DeviceKind::cuda; }
  void* native() const override { return stream; }
  uint64_t record() override {
    call(cudaEventRecord(ring[++records % kRing], stream), "cudaEventRecord");
    return records;
  }
  // Any thread may wait. A new one is on GPU 0, where its first call, whatever it asks, would open
  // a context: half a GiB there for every rank. So waits say first which GPU they mean.
  void host_wait(uint64_t ticket) override {
    use(ordinal);
    poll(ring[ticket % kRing]);
  }
  void wait(Impl& other, uint64_t ticket) override {
    if (other.device() != DeviceKind::cuda) return other.host_wait(ticket);
    auto& that = static_cast<CudaStream&>(other);
    call(cudaStreamWaitEvent(stream, that.ring[ticket % kRing], 0), "cudaStreamWaitEvent");
  }
  void synchronize() override {
    use(ordinal);
    poll(ring[record() % kRing]);
  }

  // Waits with an eye on the watcher: a lost peer would let a stream wait for ever. Polling from
  // the first microsecond keeps the wait short; the sleep that follows frees the core.
  void poll(cudaEvent_t event) {
    using Clock = std::chrono::steady_clock;
    const auto start = Clock::now();
    auto asked = start;
    for (;;) {
      const cudaError_t state = cudaEventQuery(event);
      if (state == cudaSuccess) return;
      if (state != cudaErrorNotReady) call(state, "the stream's work");
      const auto now = Clock::now();
      if (watcher && now - asked > std::chrono::milliseconds(1)) {
        watcher();
        asked = now;
      }
      if (now - start > std::chrono::milliseconds(200))
        std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }

  int ordinal = 0;
  cudaStream_t stream = nullptr;
  std::array<cudaEvent_t, kRing> ring{};
  uint64_t records = 0;
};

cudaStream_t native_of(const Stream& stream) { return static_cast<cudaStream_t>(stream.native()); }

}  // namespace

// Any error of asking means that there is none.
int count_devices(std::string* why_none) {
  int count = 0;
  const cudaError_t code = cudaGetDeviceCount(&count);
  if (code == cudaSuccess && count > 0) return count;
  if (why_none) *why_none = code == cudaSuccess ? "no GPU" : cudaGetErrorString(code);
  (void)cudaGetLastError();
  return 0;
}

std::vector<Facts> devices(std::string* why_none) {
  const int count = count_devices(why_none);
  std::vector<Facts> list;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties{};
    call(cudaGetDeviceProperties(&properties, i), "cudaGetDeviceProperties");
    list.push_back({.name = properties.name,
                    .bytes = int64_t(properties.totalGlobalMem),
                    .multiprocessors = properties.multiProcessorCount,
                    .capability = properties.major * 10 + properties.minor,
                    .uuid = hex_of_bytes({properties.uuid.bytes, sizeof properties.uuid.bytes})});
  }
  return list;
}

int64_t free_bytes() {
  size_t free = 0, total = 0;
  call(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  return int64_t(free);
}

void use(int ordinal) { call(cudaSetDevice(ordinal), "cudaSetDevice"); }

int used() {
  int ordinal = 0;
  call(cudaGetDevice(&ordinal), "cudaGetDevice");
  return ordinal;
}

std::string build() {
  return concat("CUDA ", CUDART_VERSION / 1000, ".", CUDART_VERSION % 1000 / 10);
}

std::string architectures() {
  return MOEMAMBA_CUDA_ARCHITECTURES;
}

void* allocate(int64_t bytes) {
  void* memory = nullptr;
  const cudaError_t code = cudaMalloc(&memory, size_t(bytes));
  if (code == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();
    throw Error(concat("out of GPU memory: could not allocate ", bytes, " bytes, ", free_bytes(),
                       " are free; use a smaller train.micro_batch_size or more GPUs"));
  }
  call(code, "cudaMalloc");
  return memory;
}

void release(void* memory) noexcept { cudaFree(memory); }

void* allocate_pinned(int64_t bytes) {
  void* memory = nullptr;
  call(cudaHostAlloc(&memory, size_t(bytes), cudaHostAllocPortable), "cudaHostAlloc");
  return memory;
}

void release_pinned(void* memory) noexcept { cudaFreeHost(memory); }

// On a stream of its own, and waits for that alone: on others NCCL may wait for a rank that never
// comes. The largest GPU's memory is written in a tenth of a second.
void zero_now(void* memory, int64_t bytes) {
  using Clock = std::chrono::steady_clock;
  constexpr std::chrono::seconds kPatience(60);
  cudaStream_t stream = nullptr;
  call(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  const std::shared_ptr<void> owned(
      stream, [](void* it) { cudaStreamDestroy(static_cast<cudaStream_t>(it)); });
  call(cudaMemsetAsync(memory, 0, size_t(bytes), stream), "cudaMemsetAsync");
  const auto start = Clock::now();
  for (cudaError_t state; (state = cudaStreamQuery(stream)) != cudaSuccess;) {
    if (state != cudaErrorNotReady) call(state, "cudaMemsetAsync");
    check(Clock::now() - start < kPatience, "GPU ", used(), " has not zeroed ", bytes,
          " bytes within ", kPatience.count(), " s: it hangs, or other work holds it; look at ",
          "nvidia-smi, and start again");
    std::this_thread::yield();
  }
}

std::shared_ptr<void> mark(Stream& stream) {
  cudaEvent_t event = nullptr;
  call(cudaEventCreate(&event), "cudaEventCreate");
  std::shared_ptr<void> owned(event,
                              [](void* it) { cudaEventDestroy(static_cast<cudaEvent_t>(it)); });
  call(cudaEventRecord(event, native_of(stream)), "cudaEventRecord");
  return owned;
}

double seconds_between(const std::shared_ptr<void>& from, const std::shared_ptr<void>& to) {
  const auto first = static_cast<cudaEvent_t>(from.get());
  const auto last = static_cast<cudaEvent_t>(to.get());
  call(cudaEventSynchronize(last), "cudaEventSynchronize");
  float milliseconds = 0;
  call(cudaEventElapsedTime(&milliseconds, first, last), "cudaEventElapsedTime");
  return milliseconds * 1e-3;
}

std::unique_ptr<Stream::Impl> make_stream() {
  std::string why;
  check(count_devices(&why) > 0, "no GPU: ", why, "; use --device=cpu");
  return std::make_unique<CudaStream>();
}

void copy_rows(Stream& stream, const Tensor& from, const Tensor& to) {
  if (from.elements() == 0) return;
  const size_t size = size_t(size_of(from.dtype));
  if (from.dense() && to.dense()) {
    call(cudaMemcpyAsync(to.data, from.data, size_t(from.bytes()), cudaMemcpyDefault,
                         native_of(stream)),
         "cudaMemcpyAsync");
    return;
  }
  call(cudaMemcpy2DAsync(to.data, size_t(to.stride) * size, from.data, size_t(from.stride) * size,
                         size_t(from.cols()) * size, size_t(from.rows()), cudaMemcpyDefault,
                         native_of(stream)),
       "cudaMemcpy2DAsync");
}

void zero_rows(Stream& stream, const Tensor& to) {
  if (to.elements() == 0) return;
  const size_t size = size_t(size_of(to.dtype));
  const size_t stride = size_t(to.dense() ? to.cols() : to.stride) * size;
  call(cudaMemset2DAsync(to.data, stride, 0, size_t(to.cols()) * size, size_t(to.rows()),
                         native_of(stream)),
       "cudaMemset2DAsync");
}

}  // namespace moemamba::gpu
