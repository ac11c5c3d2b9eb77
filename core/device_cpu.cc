#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "core/gpu.h"
#include "core/stream_impl.h"

namespace moemamba {

namespace {

// Threads that share the rows of one operator. The caller works too.
class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 1; i < threads; ++i) helpers_.emplace_back([this] { serve(); });
  }
  ~Pool() {
    {
      std::lock_guard lock(mutex_);
      ended_ = true;
    }
    wake_.notify_all();
    for (auto& helper : helpers_) helper.join();
  }
  int threads() const { return int(helpers_.size()) + 1; }

  void run(int64_t count, FunctionRef<void(int64_t)> body) {
    if (helpers_.empty() || count < 2) {
      for (int64_t i = 0; i < count; ++i) body(i);
      return;
    }
    {
      std::lock_guard lock(mutex_);
      body_ = &body;
      count_ = count;
      next_ = 0;
      working_ = int(helpers_.size());
      ++round_;
    }
    wake_.notify_all();
    work();
    std::unique_lock lock(mutex_);
    done_.wait(lock, [&] { return working_ == 0; });
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  void work() {
    try {
      for (int64_t i; (i = next_.fetch_add(1)) < count_;) (*body_)(i);
    } catch (...) {
      std::lock_guard lock(mutex_);
      if (!error_) error_ = std::current_exception();
      next_ = count_;
    }
  }
  void serve() {
    for (uint64_t seen = 0;;) {
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return ended_ || round_ != seen; });
        if (ended_) return;
        seen = round_;
      }
      work();
      std::lock_guard lock(mutex_);
      if (--working_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> helpers_;
  FunctionRef<void(int64_t)>* body_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0};
  int working_ = 0;
  uint64_t round_ = 0;
  bool ended_ = false;
  std::exception_ptr error_;
};

// One thread and a ring of tasks. Waiting for room blocks the submitter.
class Worker {
 public:
  Worker() : thread_([this] { serve(); }) {}
  ~Worker() {
    {
      std::lock_guard lock(mutex_);
      ended_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }
  void enqueue(const Task& task) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return submitted_ - finished_ < kRing || error_; });
    rethrow();
    ring_[submitted_++ % kRing] = task;
    changed_.notify_all();
  }
  uint64_t submitted() {
    std::lock_guard lock(mutex_);
    return submitted_;
  }
  void wait(uint64_t ticket) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return finished_ >= ticket || error_; });
    rethrow();
  }

 private:
  static constexpr uint64_t kRing = 256;
  void rethrow() {
    if (error_) std::rethrow_exception(error_);
  }
  void serve() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [&] { return ended_ || submitted_ > finished_; });
      if (submitted_ == finished_) return;
      Task task = ring_[finished_ % kRing];
      lock.unlock();
      std::exception_ptr error;
      try {
        task();
      } catch (...) {
        error = std::current_exception();
      }
      lock.lock();
      if (error) {
        error_ = error;
        changed_.notify_all();
        return;
      }
      ++finished_;
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::array<Task, kRing> ring_;
  uint64_t submitted_ = 0, finished_ = 0;
  bool ended_ = false;
  std::exception_ptr error_;
  std::thread thread_;  // last: starts when all else is there
};

struct ImmediateStream : Stream::Impl {
  explicit ImmediateStream(int threads) : pool(threads) {}
  int threads() const override { return pool.threads(); }
  void parallel_for(int64_t count, FunctionRef<void(int64_t)> body) override {
    pool.run(count, body);
  }
  Pool pool;
};

struct WorkerStream : Stream::Impl {
  bool runs_at_once() const override { return false; }
  void enqueue(const Task& task) override { worker.enqueue(task); }
  uint64_t record() override { return worker.submitted(); }
  void host_wait(uint64_t ticket) override { worker.wait(ticket); }
  void wait(Impl& other, uint64_t ticket) override {
    worker.enqueue(Task([&other, ticket] { other.host_wait(ticket); }));
  }
  void synchronize() override { worker.wait(worker.submitted()); }
  Worker worker;
};

struct DryStream : Stream::Impl {
  explicit DryStream(DeviceKind planned) : planned(planned) {}
  DeviceKind device() const override { return planned; }
  bool is_dry() const override { return true; }
  bool runs_at_once() const override { return false; }
  void wait(Impl&, uint64_t) override {}
  DeviceKind planned;
};

}  // namespace

Stream::Stream(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Stream::Stream(Stream&&) noexcept = default;
Stream::~Stream() = default;

Stream Stream::immediate(int threads) {
  check(threads >= 1 && threads <= 1024, "threads per rank: 1 .. 1024, found ", threads);
  return Stream(std::make_unique<ImmediateStream>(threads));
}

Stream Stream::worker() { return Stream(std::make_unique<WorkerStream>()); }
Stream Stream::dry(DeviceKind device) { return Stream(std::make_unique<DryStream>(device)); }
Stream Stream::cuda() { return Stream(gpu::make_stream()); }

bool Stream::is_dry() const { return impl_->is_dry(); }
bool Stream::runs_at_once() const { return impl_->runs_at_once(); }
int Stream::threads() const { return impl_->threads(); }
DeviceKind Stream::device() const { return impl_->device(); }
void* Stream::native() const { return impl_->native(); }
std::shared_ptr<void>& Stream::attachment() { return impl_->attachment; }
void Stream::watch(std::function<void()> watcher) { impl_->watcher = std::move(watcher); }
void Stream::look() const {
  if (impl_->watcher) impl_->watcher();
}
void Stream::enqueue(Task task) { impl_->enqueue(task); }

Event Stream::record() {
  const uint64_t ticket = impl_->record();
  return ticket ? Event{this, ticket} : Event{};
}

void Stream::wait(Event event) {
  if (!event.stream || event.stream == this) return;
  impl_->wait(*event.stream->impl_, event.ticket);
}

void Stream::synchronize() { impl_->synchronize(); }

void Stream::wait_on_host(Event event) {
  if (event.stream) event.stream->impl_->host_wait(event.ticket);
}

void Stream::parallel_for(int64_t count, FunctionRef<void(int64_t)> body) {
  impl_->parallel_for(count, body);
}

std::byte* Stream::workspace(size_t bytes) {
  if (int64_t(bytes) > impl_->scratch.bytes()) {
    synchronize();  // work that was enqueued may still use the old one
    impl_->scratch = Buffer(device(), int64_t(bytes));
  }
  return impl_->scratch.data();
}

void copy(Stream& stream, const Tensor& from, const Tensor& to) {
  check(from.elements() == to.elements() && from.cols() == to.cols() && from.dtype == to.dtype,
        "copy: ", to_string(from.shape), " ", name_of(from.dtype), " to ", to_string(to.shape), " ",
        name_of(to.dtype));
  if (stream.is_dry() || from.elements() == 0) return;
  if (stream.device() == DeviceKind::cuda) return gpu::copy_rows(stream, from, to);
  stream.submit([from, to] {
    const int64_t size = size_of(from.dtype);
    if (from.dense() && to.dense()) {
      std::memcpy(to.data, from.data, size_t(from.bytes()));
      return;
    }
    for (int64_t r = 0; r < from.rows(); ++r)
      std::memcpy(static_cast<char*>(to.data) + r * to.stride * size,
                  static_cast<const char*>(from.data) + r * from.stride * size,
                  size_t(from.cols() * size));
  });
}

void fill_zero(Stream& stream, const Tensor& to) {
  if (stream.is_dry() || to.elements() == 0) return;
  if (stream.device() == DeviceKind::cuda) return gpu::zero_rows(stream, to);
  stream.submit([to] {
    const int64_t size = size_of(to.dtype);
    for (int64_t r = 0; r < to.rows(); ++r)
      std::memset(static_cast<char*>(to.data) + r * to.stride * size, 0, size_t(to.cols() * size));
  });
}

}  // namespace moemamba
