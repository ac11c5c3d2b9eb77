#pragma once
#include <chrono>
#include <functional>
#include <memory>
#include <new>
#include <span>

#include "core/tensor.h"

namespace moemamba {

// A reference to a callable; never owns, never allocates.
template <class Signature>
class FunctionRef;
template <class R, class... Args>
class FunctionRef<R(Args...)> {
 public:
  template <class F>
  FunctionRef(F&& f)  // NOLINT: converts on purpose
      : object_(const_cast<void*>(static_cast<const void*>(&f))),
        call_([](void* object, Args... args) -> R {
          return (*static_cast<std::remove_reference_t<F>*>(object))(static_cast<Args>(args)...);
        }) {}
  R operator()(Args... args) const { return call_(object_, static_cast<Args>(args)...); }

 private:
  void* object_;
  R (*call_)(void*, Args...);
};

// A task that a stream runs later: a small callable held in place (no allocation).
class Task {
 public:
  static constexpr size_t kBytes = 192;
  template <class F>
  explicit Task(const F& f) : call_([](void* storage) { (*static_cast<F*>(storage))(); }) {
    static_assert(sizeof(F) <= kBytes && std::is_trivially_copyable_v<F>);
    new (storage_) F(f);
  }
  Task() = default;
  void operator()() { call_(storage_); }

 private:
  alignas(16) std::byte storage_[kBytes];
  void (*call_)(void*) = nullptr;
};

class Stream;

// Told of an immediate stream's work by the thread that submits it; work may hold other work.
// Measures, and changes nothing.
class StreamObserver {
 public:
  virtual ~StreamObserver() = default;
  virtual void begin(const char* work) = 0;
  virtual void end() = 0;
};

// A point in a stream's work. Default-made: long past.
struct Event {
  Stream* stream = nullptr;
  uint64_t ticket = 0;
};

// Work in order. On the CPU there are three kinds: `immediate` runs a task before submit() returns
// and shares an operator's rows among `threads` cores; `worker` is a thread of its own, so that
// communication overlaps compute; `dry` runs nothing (a plan walks the same code with it).
// A task that throws poisons a worker: the exception comes out of its next wait or submit.
// `cuda` is a stream of the GPU that the calling thread uses: operators are enqueued there. A task
// of submit() runs on the host at once, and enqueues what it has for the device.
class Stream {
 public:
  static Stream immediate(int threads = 1);
  static Stream worker();
  static Stream dry(DeviceKind device = DeviceKind::cpu);  // device: what it plans for
  static Stream cuda();  // Error without a GPU, or in a build without CUDA
  Stream(Stream&&) noexcept;
  ~Stream();

  bool is_dry() const;
  int threads() const;
  DeviceKind device() const;
  void* native() const;  // the cudaStream_t of a CUDA stream; null of others
  // What a backend keeps with its stream, say a library's handle; empty at first.
  std::shared_ptr<void>& attachment();
  // Called again and again while the host waits for this stream; what it throws ends the wait.
  // Null: nobody. Only for CUDA streams, whose work cannot throw by itself.
  void watch(std::function<void()> watcher);
  void look() const;  // calls the watcher: for who waits for this stream's work in a way of his own

  // F: trivially copyable, at most Task::kBytes; what it points at must outlive it.
  template <class F>
  void submit(const F& f) {
    if (runs_at_once()) f();
    else if (!is_dry()) enqueue(Task(f));
  }
  Event record();            // done when all that was submitted before is done
  void wait(Event event);    // later work of this stream starts after `event`
  void synchronize();        // the host waits; throws what a task threw
  static void wait_on_host(Event event);  // until it is past

  // Calls body(i) for 0 <= i < count, split over threads(); which thread runs which i must not
  // matter. Only from work of this stream.
  void parallel_for(int64_t count, FunctionRef<void(int64_t)> body);

  // At least `bytes` of scratch on the stream's device, 64-byte aligned, valid until the next call
  // (of work that was enqueued before, too). Grows; what an operator asks for depends on capacities
  // alone, so nothing grows after step one.
  std::byte* workspace(size_t bytes);

  void observe(StreamObserver* observer) { observer_ = observer; }  // null: nobody (as at first)
  StreamObserver* observer() const { return observer_; }

  struct Impl;  // core/stream_impl.h: what a kind of stream has to know
  explicit Stream(std::unique_ptr<Impl> impl);

 private:
  bool runs_at_once() const;
  void enqueue(Task task);
  std::unique_ptr<Impl> impl_;
  StreamObserver* observer_ = nullptr;
};

// Work that a stream's observer is told of, from here to the end of the scope.
class Observed {
 public:
  Observed(const Stream& stream, const char* work) : observer_(stream.observer()) {
    if (observer_) observer_->begin(work);
  }
  ~Observed() {
    if (observer_) observer_->end();
  }
  Observed(const Observed&) = delete;
  Observed& operator=(const Observed&) = delete;

 private:
  StreamObserver* observer_;
};

void copy(Stream& stream, const Tensor& from, const Tensor& to);  // same shape and dtype
void fill_zero(Stream& stream, const Tensor& to);

}  // namespace moemamba
