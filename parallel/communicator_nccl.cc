#include "parallel/communicator_nccl.h"

#include <cuda_runtime.h>
#include <nccl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "core/arena.h"
#include "core/gpu.h"
#include "parallel/pending_calls.h"

namespace moemamba {

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr milliseconds kGrace(2000);  // of an abort that hangs
constexpr int64_t kFlag = 16;         // bytes of a rank in a barrier

void call(cudaError_t code, const char* what) {
  check(code == cudaSuccess, "CUDA: ", what, ": ", cudaGetErrorString(code), " (",
        cudaGetErrorName(code), ")");
}

cudaStream_t native(const Stream& stream) {
  return static_cast<cudaStream_t>(stream.native());
}

// Ends the process unless it is gone before the grace time is over. NCCL's abort has been seen to
// wait for what it should end; then there is no other way out.
class Grace {
 public:
  // why: what the caller has not been able to say yet.
  Grace(std::string group, std::string why, milliseconds time, int exit_code) {
    std::thread([over = over_, group = std::move(group), why = std::move(why), time, exit_code] {
      const auto end = Clock::now() + time;
      while (Clock::now() < end) {
        if (*over) return;
        std::this_thread::sleep_for(milliseconds(20));
      }
      std::fprintf(stderr,
                   "moemamba: %s\nmoemamba: group %s could not be ended within %d ms; this process "
                   "ends itself\n",
                   why.c_str(), group.c_str(), int(time.count()));
      std::_Exit(exit_code);
    }).detach();
  }
  ~Grace() { *over_ = true; }
  Grace(const Grace&) = delete;
  Grace& operator=(const Grace&) = delete;

 private:
  std::shared_ptr<std::atomic<bool>> over_ = std::make_shared<std::atomic<bool>>(false);
};

class NcclCommunicator final : public Communicator {
 public:
  NcclCommunicator(std::unique_ptr<Communicator> beside, std::vector<int> world_ranks,
                   milliseconds deadline, int exit_code);
  ~NcclCommunicator() override;

  int rank() const override { return beside_->rank(); }
  int size() const override { return beside_->size(); }
  const std::string& name() const override { return beside_->name(); }
  void all_to_all(Stream& stream, const AllToAll& call) override;
  void all_gather(Stream& stream, const void* send, void* recv, int64_t bytes) override;
  void poll() override;
  void abort(const std::string& why) noexcept override;

 private:
  // Around a call. Whoever watches this rank hears of it when it is enqueued, and of its end when
  // somebody looks.
  struct Events {
    cudaEvent_t begun = nullptr, done = nullptr;
  };

  void connect();
  void begin(std::unique_lock<std::mutex>& lock, const Stream& stream);
  void end(const Stream& stream);
  void exchange(Stream& stream, const AllToAll& call);
  void look();  // what poll() looks for, in this order
  PendingCalls::Marks marks();
  static std::chrono::nanoseconds time_of(const Events& events);  // REQUIRES: they are past
  void take(ncclResult_t result);    // fails unless it is success or "in progress"
  void settle(ncclResult_t result);  // waits until NCCL has done what it does on the host
  [[noreturn]] void fail(ncclResult_t result);
  [[noreturn]] void miss();
  [[noreturn]] void lose(PeerLost lost);
  void tear_down() noexcept;
  int world(int peer) const { return world_ranks_[size_t(peer)]; }
  int other_of_pair() const { return size() == 2 ? world(1 - rank()) : -1; }

  std::unique_ptr<Communicator> beside_;
  std::vector<int> world_ranks_;
  milliseconds deadline_;
  int exit_code_;
  int gpu_;       // poll() and abort() come from any thread, and a new one is on GPU 0
  Buffer flags_;  // of barriers and of the first calls

  std::mutex mutex_;  // of all below: poll() and abort() come from any thread
  ncclComm_t comm_ = nullptr;
  std::array<Events, PendingCalls::kMost> events_;
  PendingCalls calls_;
  std::optional<PeerLost> lost_;
};

NcclCommunicator::NcclCommunicator(std::unique_ptr<Communicator> beside,
                                   std::vector<int> world_ranks, milliseconds deadline,
                                   int exit_code)
    : beside_(std::move(beside)),
      world_ranks_(std::move(world_ranks)),
      deadline_(deadline),
      exit_code_(exit_code),
      gpu_(gpu::used()),
      flags_(DeviceKind::cuda, 2 * beside_->size() * kFlag),
      calls_(marks(), deadline) {
  for (Events& events : events_) {
    call(cudaEventCreate(&events.begun), "cudaEventCreate");
    call(cudaEventCreate(&events.done), "cudaEventCreate");
  }
  try {
    connect();
  } catch (...) {  // no destructor will run
    tear_down();
    throw;
  }
}

NcclCommunicator::~NcclCommunicator() {
  if (comm_ && !lost_) {
    const Grace grace(name(), "not all ranks have come to the end", std::max(kGrace, deadline_),
                      exit_code_);
    ncclResult_t state = ncclCommFinalize(comm_);
    while (state == ncclInProgress && ncclCommGetAsyncError(comm_, &state) == ncclSuccess)
      std::this_thread::yield();
    ncclCommDestroy(comm_);
  } else {
    tear_down();
  }
  for (Events& events : events_) {
    cudaEventDestroy(events.begun);
    cudaEventDestroy(events.done);
  }
}

// The group and, by a first call of each kind, all its connections: later calls never wait on the
// host for a member that has not come.
void NcclCommunicator::connect() {
  ncclUniqueId own{};
  if (rank() == 0) take(ncclGetUniqueId(&own));
  std::vector<ncclUniqueId> ids(static_cast<size_t>(size()));
  Stream host = Stream::immediate();
  beside_->all_gather(host, &own, ids.data(), sizeof own);
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;  // so that nothing below waits without a deadline
  settle(ncclCommInitRankConfig(&comm_, size(), ids[0], rank(), &config));

  Stream stream = Stream::cuda();
  stream.watch([this] { poll(); });
  std::vector<int64_t> places, bytes(size_t(size()), kFlag);
  for (int r = 0; r < size(); ++r) places.push_back(r * kFlag);
  barrier(*this, stream);
  all_to_all(stream, {.send = flags_.data(),
                      .send_offsets = places.data(),
                      .send_bytes = bytes.data(),
                      .recv = flags_.data() + size() * kFlag,
                      .recv_offsets = places.data(),
                      .recv_bytes = bytes.data()});
  stream.synchronize();
}

void NcclCommunicator::all_to_all(Stream& stream, const AllToAll& call) {
  std::unique_lock lock(mutex_);
  begin(lock, stream);
  exchange(stream, call);
  end(stream);
}

// Each rank begins with its right neighbour. Both sides leave out what has no bytes.
void NcclCommunicator::exchange(Stream& stream, const AllToAll& c) {
  const int64_t own = c.send_bytes[rank()];
  check(own == c.recv_bytes[rank()], "group ", name(), ": rank ", world(rank()), " sends ", own,
        " bytes to itself, but expects ", c.recv_bytes[rank()]);
  const auto at = [](const void* base, int64_t offset) {
    return const_cast<char*>(static_cast<const char*>(base)) + offset;
  };
  take(ncclGroupStart());
  ncclResult_t worst = ncclSuccess;  // told once the group has ended
  const auto enqueue = [&](ncclResult_t result) {
    if (result != ncclSuccess && result != ncclInProgress) worst = result;
  };
  for (int step = 1; step < size(); ++step) {
    const int to = (rank() + step) % size(), from = (rank() + size() - step) % size();
    if (c.send_bytes[to] > 0)
      enqueue(ncclSend(at(c.send, c.send_offsets[to]), size_t(c.send_bytes[to]), ncclUint8, to,
                       comm_, native(stream)));
    if (c.recv_bytes[from] > 0)
      enqueue(ncclRecv(at(c.recv, c.recv_offsets[from]), size_t(c.recv_bytes[from]), ncclUint8,
                       from, comm_, native(stream)));
  }
  const ncclResult_t ended = ncclGroupEnd();
  take(worst);
  settle(ended);
  char *source = at(c.send, c.send_offsets[rank()]), *target = at(c.recv, c.recv_offsets[rank()]);
  if (own > 0 && source != target)
    moemamba::copy(stream, view(source, {own}, DType::u8, DeviceKind::cuda),
                   view(target, {own}, DType::u8, DeviceKind::cuda));
}

void NcclCommunicator::all_gather(Stream& stream, const void* send, void* recv, int64_t bytes) {
  std::unique_lock lock(mutex_);
  begin(lock, stream);
  if (bytes == 0) {  // NCCL leaves out what has no bytes, but here all wait for all
    send = flags_.data() + rank() * kFlag;
    recv = flags_.data();
    bytes = kFlag;
  }
  settle(ncclAllGather(send, recv, size_t(bytes), ncclUint8, comm_, native(stream)));
  end(stream);
}

// The GPU starves of nothing while the host waits for a place: kMost calls are ahead. The oldest
// may stand behind another group's that hangs, so the stream's watcher looks too, and it may look
// here.
void NcclCommunicator::begin(std::unique_lock<std::mutex>& lock, const Stream& stream) {
  check(stream.device() == DeviceKind::cuda, "group ", name(), ": NCCL works on CUDA streams");
  for (look(); calls_.full(); look()) {
    lock.unlock();
    stream.look();
    std::this_thread::sleep_for(std::chrono::microseconds(50));
    lock.lock();
  }
  begin_call();
  call(cudaEventRecord(events_[size_t(calls_.next())].begun, native(stream)), "cudaEventRecord");
}

void NcclCommunicator::end(const Stream& stream) {
  call(cudaEventRecord(events_[size_t(calls_.next())].done, native(stream)), "cudaEventRecord");
  calls_.add();
}

void NcclCommunicator::poll() {
  gpu::use(gpu_);
  std::lock_guard lock(mutex_);
  look();
}

void NcclCommunicator::look() {
  if (lost_) throw PeerLost(*lost_);
  try {
    beside_->poll();
  } catch (const PeerLost& lost) {
    lose(lost);
  }
  if (!comm_) return;
  ncclResult_t state = ncclSuccess;
  take(ncclCommGetAsyncError(comm_, &state));
  take(state);
  if (calls_.look()) miss();
}

PendingCalls::Marks NcclCommunicator::marks() {
  const auto past = [](cudaEvent_t event) {
    const cudaError_t state = cudaEventQuery(event);
    if (state != cudaErrorNotReady) call(state, "the stream's work");
    return state == cudaSuccess;
  };
  return {.begun = [this, past](int place) { return past(events_[size_t(place)].begun); },
          .done = [this, past](int place) { return past(events_[size_t(place)].done); },
          .ended =
              [this](int place) {
                if (activity()) end_call(time_of(events_[size_t(place)]));
              }};
}

std::chrono::nanoseconds NcclCommunicator::time_of(const Events& events) {
  float time = 0;  // in milliseconds
  call(cudaEventElapsedTime(&time, events.begun, events.done), "cudaEventElapsedTime");
  return std::chrono::nanoseconds(int64_t(double(time) * 1e6));
}

void NcclCommunicator::take(ncclResult_t result) {
  if (result != ncclSuccess && result != ncclInProgress) fail(result);
}

void NcclCommunicator::settle(ncclResult_t result) {
  const auto end = Clock::now() + deadline_;
  auto asked = Clock::now();
  while (result == ncclInProgress) {
    std::this_thread::yield();
    if (ncclResult_t asking = ncclCommGetAsyncError(comm_, &result); asking != ncclSuccess)
      result = asking;
    const auto now = Clock::now();
    if (result != ncclInProgress || now - asked < milliseconds(1)) continue;
    asked = now;
    try {
      beside_->poll();
    } catch (const PeerLost& lost) {
      lose(lost);
    }
    if (now > end) miss();
  }
  take(result);
}

void NcclCommunicator::fail(ncclResult_t result) {
  const std::string why =
      concat("NCCL: ", ncclGetErrorString(result), ": ", ncclGetLastError(comm_));
  check(result != ncclInvalidArgument && result != ncclInvalidUsage, "group ", name(), ": ", why);
  // What went wrong with the others is their loss; all else happened here.
  const bool theirs = result == ncclRemoteError || result == ncclSystemError;
  lose(PeerLost(name(), theirs ? other_of_pair() : world(rank()), why));
}

void NcclCommunicator::miss() {
  std::string others;
  for (int peer = 0; peer < size(); ++peer)
    if (peer != rank()) others += (others.empty() ? "" : ", ") + std::to_string(world(peer));
  lose(PeerLost(name(), other_of_pair(),
                concat("nothing heard for ", deadline_.count(), " ms from ",
                       size() == 2 ? "rank " : "one of ranks ", others)));
}

void NcclCommunicator::lose(PeerLost lost) {
  lost_ = std::move(lost);
  tear_down();
  throw PeerLost(*lost_);
}

void NcclCommunicator::tear_down() noexcept {
  if (!comm_) return;
  (void)cudaSetDevice(gpu_);  // what fails here is told already
  const Grace grace(name(), lost_ ? lost_->what() : "its work was given up", kGrace, exit_code_);
  ncclCommAbort(std::exchange(comm_, nullptr));
}

// Those who wait hear of it over `beside`, and then tear their own down.
void NcclCommunicator::abort(const std::string& why) noexcept {
  beside_->abort(why);
  std::lock_guard lock(mutex_);
  if (!lost_) lost_ = PeerLost(name(), world(rank()), "stopped: " + why);
  tear_down();
}

}  // namespace

std::unique_ptr<Communicator> make_nccl_communicator(std::unique_ptr<Communicator> beside,
                                                     std::vector<int> world_ranks,
                                                     milliseconds deadline, int exit_code) {
  return std::make_unique<NcclCommunicator>(std::move(beside), std::move(world_ranks), deadline,
                                            exit_code);
}

std::string nccl_version() {
  int version = 0;  // 22105: 2.21.5
  if (ncclGetVersion(&version) != ncclSuccess) return "unknown";
  return concat(version / 10000, ".", version % 10000 / 100, ".", version % 100);
}

}  // namespace moemamba
