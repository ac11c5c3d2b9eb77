#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <numeric>
#include <optional>

#include "parallel/communicator.h"
#include "parallel/gather_call.h"

namespace moemamba {

namespace {

using Clock = std::chrono::steady_clock;

// Why no call of the group can succeed any more.
struct Failure {
  int world_rank;  // -1 = not known
  std::string why;
  int pair[2] = {-1, -1};  // seats whose counts differ: they throw Error, the others PeerLost
};

// What the seats of a group share. A call has two meetings: all have posted what they send and
// where they want what they get; all have copied what is for them out of the others' memory.
class Meeting {
 public:
  Meeting(std::string name, std::chrono::milliseconds deadline, std::vector<int> world_ranks)
      : name_(std::move(name)),
        deadline_(deadline),
        world_ranks_(std::move(world_ranks)),
        calls_(world_ranks_.size()),
        posted_(world_ranks_.size()),
        copied_(world_ranks_.size()) {}

  const std::string& name() const { return name_; }
  int size() const { return int(world_ranks_.size()); }

  // On a CUDA stream the host waits for the memory that is exchanged, before and after; but a group
  // of one enqueues its copy.
  void exchange(int rank, Stream& stream, const Communicator::AllToAll& call) {
    const bool on_device = stream.device() == DeviceKind::cuda;
    if (on_device && size() > 1) stream.synchronize();
    const auto deadline = Clock::now() + deadline_;
    std::unique_lock lock(mutex_);
    calls_[size_t(rank)] = call;
    const uint64_t round = ++posted_[size_t(rank)];
    if (all(posted_, round)) compare_counts();
    changed_.notify_all();
    wait(lock, rank, deadline, posted_, round);
    ++copying_;
    lock.unlock();
    copy_for(rank, on_device ? &stream : nullptr);
    if (on_device && size() > 1) stream.synchronize();
    lock.lock();
    --copying_;
    copied_[size_t(rank)] = round;
    changed_.notify_all();
    wait(lock, rank, deadline, copied_, round);
  }

  void poll() {
    std::lock_guard lock(mutex_);
    if (failure_) throw PeerLost(name_, failure_->world_rank, failure_->why);
  }

  void abort(int rank, const std::string& why) {
    std::lock_guard lock(mutex_);
    if (!failure_) failure_ = Failure{world_ranks_[size_t(rank)], "stopped: " + why};
    changed_.notify_all();
  }

 private:
  static bool all(const std::vector<uint64_t>& reached, uint64_t round) {
    return std::ranges::all_of(reached, [&](uint64_t r) { return r >= round; });
  }

  // Run by the last to post, while every seat's arrays are certainly alive.
  void compare_counts() {
    for (int from = 0; from < size() && !failure_; ++from) {
      for (int to = 0; to < size() && !failure_; ++to) {
        const int64_t sent = calls_[size_t(from)].send_bytes[to];
        const int64_t expected = calls_[size_t(to)].recv_bytes[from];
        if (sent == expected) continue;
        const int from_world = world_ranks_[size_t(from)], to_world = world_ranks_[size_t(to)];
        failure_ = Failure{to_world,
                    concat("rank ", from_world, " sends ", sent, " bytes to rank ", to_world,
                           ", which expects ", expected),
                    {from, to}};
      }
    }
  }

  // stream: of a GPU, whose memory it may be; null: the host's.
  void copy_for(int rank, Stream* stream) const {
    const Communicator::AllToAll& mine = calls_[size_t(rank)];
    for (int from = 0; from < size(); ++from) {
      const Communicator::AllToAll& theirs = calls_[size_t(from)];
      if (mine.recv_bytes[from] == 0) continue;
      const char* source = static_cast<const char*>(theirs.send) + theirs.send_offsets[rank];
      char* target = static_cast<char*>(mine.recv) + mine.recv_offsets[from];
      const int64_t bytes = mine.recv_bytes[from];
      if (source == target) continue;
      if (stream)
        copy(*stream, view(const_cast<char*>(source), {bytes}, DType::u8),
             view(target, {bytes}, DType::u8));
      else
        std::memcpy(target, source, size_t(bytes));
    }
  }

  // Until all have reached `round`. After a failure nobody starts to copy any more, and nobody
  // leaves before those who copy are done: they read the memory of those who leave.
  void wait(std::unique_lock<std::mutex>& lock, int rank, Clock::time_point deadline,
            const std::vector<uint64_t>& reached, uint64_t round) {
    while (!failure_ && !all(reached, round)) {
      const bool late = changed_.wait_until(lock, deadline) == std::cv_status::timeout;
      if (late && !failure_ && !all(reached, round)) miss(reached, round);
    }
    if (!failure_) return;
    changed_.wait(lock, [&] { return copying_ == 0; });
    if (rank == failure_->pair[0] || rank == failure_->pair[1])
      throw Error(concat("group ", name_, ": ", failure_->why));
    throw PeerLost(name_, failure_->world_rank, failure_->why);
  }

  void miss(const std::vector<uint64_t>& reached, uint64_t round) {
    std::string missing;
    int count = 0, one = -1;
    for (int r = 0; r < size(); ++r) {
      if (reached[size_t(r)] >= round) continue;
      one = world_ranks_[size_t(r)];
      missing += (count++ ? ", " : "") + std::to_string(one);
    }
    failure_ = Failure{count == 1 ? one : -1,
                concat("nothing heard for ", deadline_.count(), " ms from rank ", missing)};
    changed_.notify_all();
  }

  const std::string name_;
  const std::chrono::milliseconds deadline_;
  const std::vector<int> world_ranks_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Communicator::AllToAll> calls_;  // the current call of each seat
  std::vector<uint64_t> posted_, copied_;      // calls so far of each seat
  int copying_ = 0;
  std::optional<Failure> failure_;
};

class ThreadCommunicator final : public Communicator {
 public:
  ThreadCommunicator(std::shared_ptr<Meeting> meeting, int rank)
      : meeting_(std::move(meeting)), rank_(rank), gather_(meeting_->size()) {}

  int rank() const override { return rank_; }
  int size() const override { return meeting_->size(); }
  const std::string& name() const override { return meeting_->name(); }

  void all_to_all(Stream& stream, const AllToAll& call) override {
    stream.submit([this, &stream, call] {
      const InCall in_call(*this);
      meeting_->exchange(rank_, stream, call);
    });
  }
  void all_gather(Stream& stream, const void* send, void* recv, int64_t bytes) override {
    stream.submit([this, &stream, send, recv, bytes] {
      const InCall in_call(*this);
      meeting_->exchange(rank_, stream, gather_.fill(send, recv, bytes));
    });
  }
  void poll() override { meeting_->poll(); }
  void abort(const std::string& why) noexcept override { meeting_->abort(rank_, why); }

 private:
  std::shared_ptr<Meeting> meeting_;
  int rank_;
  GatherCall gather_;
};

}  // namespace

std::vector<std::unique_ptr<Communicator>> make_thread_group(int size, std::string name,
                                                             std::chrono::milliseconds deadline,
                                                             std::vector<int> world_ranks) {
  check(size >= 1, "group ", name, ": a group has at least 1 member, found ", size);
  if (world_ranks.empty()) {
    world_ranks.resize(size_t(size));
    std::iota(world_ranks.begin(), world_ranks.end(), 0);
  }
  check(int(world_ranks.size()) == size, "group ", name, ": ", size, " members, but ",
        world_ranks.size(), " world ranks");
  auto meeting = std::make_shared<Meeting>(std::move(name), deadline, std::move(world_ranks));
  std::vector<std::unique_ptr<Communicator>> seats;
  for (int r = 0; r < size; ++r) seats.push_back(std::make_unique<ThreadCommunicator>(meeting, r));
  return seats;
}

}  // namespace moemamba
