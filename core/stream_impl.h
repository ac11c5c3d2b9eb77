#pragma once
#include <functional>
#include <memory>

#include "core/arena.h"

namespace moemamba {

// One kind of stream: core/device_cpu.cc has those of the CPU, core/device_cuda.cc that of a GPU.
// Tickets count a stream's records; 0 is long past.
struct Stream::Impl {
  virtual ~Impl() = default;
  virtual DeviceKind device() const { return DeviceKind::cpu; }
  virtual void* native() const { return nullptr; }
  virtual bool is_dry() const { return false; }
  virtual bool runs_at_once() const { return true; }
  virtual int threads() const { return 1; }
  virtual void enqueue(const Task&) {}
  virtual uint64_t record() { return 0; }
  virtual void host_wait(uint64_t) {}  // until what was recorded as this ticket is done
  virtual void wait(Impl& other, uint64_t ticket) { other.host_wait(ticket); }
  virtual void synchronize() {}
  virtual void parallel_for(int64_t count, FunctionRef<void(int64_t)> body) {
    for (int64_t i = 0; i < count; ++i) body(i);
  }

  Buffer scratch;
  std::shared_ptr<void> attachment;
  std::function<void()> watcher;
};

}  // namespace moemamba
