#include "tests/support/occupier.h"

#include <cuda_runtime.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>

#include "core/error.h"
#include "core/random.h"

namespace moemamba {

namespace {

constexpr int kThreads = 1024;

void call(cudaError_t code, const char* what) {
  check(code == cudaSuccess, "occupier: ", what, ": ", cudaGetErrorString(code));
}

// One block holds half of a multiprocessor's threads and, by its shared memory, most of the rest.
// Reads a clock only: no memory is touched, so nothing but time is taken from others.
__global__ void __launch_bounds__(kThreads) hold(int64_t nanoseconds) {
  uint64_t begin, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
  do {
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (int64_t(now - begin) < nanoseconds);
}

}  // namespace

struct Occupier::Work {
  int ordinal = 0;
  uint64_t seed;
  std::atomic<bool> stop{false};
  std::atomic<int64_t> launches{0};
  std::mutex mutex;
  std::string failure;
  std::thread thread;

  void run() {
    call(cudaSetDevice(ordinal), "cudaSetDevice");
    int processors = 0, shared = 0, least = 0, greatest = 0;
    call(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, ordinal), "attribute");
    call(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal),
         "attribute");
    call(cudaDeviceGetStreamPriorityRange(&least, &greatest), "priorities");
    call(cudaFuncSetAttribute(hold, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
         "shared memory");
    cudaStream_t stream = nullptr;
    call(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest), "stream");
    const Random random(seed, "occupier");
    for (uint64_t i = 0; !stop; i += 4) {
      const auto blocks = unsigned(1 + random.integer(i, uint64_t(processors)));
      const auto time = int64_t(10'000 + random.integer(i + 1, 290'000));
      const size_t memory = random.integer(i + 2, 2) ? size_t(shared) : 0;
      hold<<<blocks, kThreads, memory, stream>>>(time);
      call(cudaGetLastError(), "launch");
      ++launches;
      // Every other kernel is waited for; so few are under way when the object ends.
      if (random.integer(i + 3, 2)) call(cudaStreamSynchronize(stream), "wait");
      std::this_thread::sleep_for(std::chrono::microseconds(random.integer(i + 3, 200)));
    }
    call(cudaStreamSynchronize(stream), "wait");
    call(cudaStreamDestroy(stream), "cudaStreamDestroy");
  }
};

Occupier::Occupier(uint64_t seed) : work_(std::make_shared<Work>()) {
  call(cudaGetDevice(&work_->ordinal), "cudaGetDevice");
  work_->seed = seed;
  work_->thread = std::thread([work = work_.get()] {
    try {
      work->run();
    } catch (const std::exception& error) {
      std::lock_guard lock(work->mutex);
      work->failure = error.what();
    }
  });
}

Occupier::~Occupier() {
  work_->stop = true;
  work_->thread.join();
}

int64_t Occupier::launches() const { return work_->launches; }

std::string Occupier::failure() const {
  std::lock_guard lock(work_->mutex);
  return work_->failure;
}

}  // namespace moemamba
