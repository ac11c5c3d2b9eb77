#include "parallel/communicator_mpi.h"

#include <mpi.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <thread>

#include "parallel/gather_call.h"

namespace moemamba {

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

constexpr int kHeaderTag = 1, kDataTag = 2, kAbortTag = 3;
constexpr int64_t kPiece = 32 << 20;  // bytes of one MPI message: its count must fit an int

// Sent by every member to every other at the start of each call: both sides see a mismatch before
// a byte of data arrives, and a member that never comes is known by name.
struct Header {
  int64_t sends;    // bytes from the sender of this header to its receiver
  int64_t expects;  // bytes that the sender of this header expects from its receiver
};

struct AbortMessage {
  int32_t world_rank = -1;
  std::array<char, 508> why{};
};

std::string describe(int code) {
  std::array<char, MPI_MAX_ERROR_STRING> text{};
  int length = 0;
  MPI_Error_string(code, text.data(), &length);
  return "MPI: " + std::string(text.data(), size_t(length));
}

// Between two polls. A rank that waits for others must not burn the core on which they work: soon
// it sleeps, up to 100 us at a time. Once all have come, data flows, and polling is what moves it:
// only yields, and short sleeps when nothing arrived for a while (a slow wire, a peer that hangs).
class BackOff {
 public:
  void progress(bool data_flows) {
    data_flows_ = data_flows;
    since_ = Clock::now();
    sleep_ = microseconds(10);
  }
  void pause(Clock::time_point now) {
    if (now - since_ < (data_flows_ ? kPatienceInFlow : kPatience)) {
      std::this_thread::yield();
      return;
    }
    std::this_thread::sleep_for(sleep_);
    sleep_ = std::min(sleep_ * 2, data_flows_ ? kLongestInFlow : kLongest);
  }

 private:
  static constexpr microseconds kPatience{30}, kPatienceInFlow{20000};
  static constexpr microseconds kLongest{100}, kLongestInFlow{20};
  bool data_flows_ = false;
  Clock::time_point since_ = Clock::now();
  microseconds sleep_{10};
};

class MpiCommunicator final : public Communicator {
 public:
  MpiCommunicator(std::shared_ptr<std::mutex> mpi, MPI_Comm comm, std::vector<int> world_ranks,
                  std::string name, std::chrono::milliseconds deadline);
  ~MpiCommunicator() override;

  int rank() const override { return rank_; }
  int size() const override { return int(world_ranks_.size()); }
  const std::string& name() const override { return name_; }
  void all_to_all(Stream& stream, const AllToAll& call) override {
    stream.submit([this, call] { exchange(call); });
  }
  void all_gather(Stream& stream, const void* send, void* recv, int64_t bytes) override {
    stream.submit(
        [this, send, recv, bytes] { exchange(gather_.fill(send, recv, bytes)); });
  }
  void poll() override;
  void abort(const std::string& why) noexcept override;

 private:
  enum class Kind : uint8_t { header_in, header_out, data_in, data_out };
  struct Part {
    Kind kind;
    int peer;
  };

  void exchange(const AllToAll& call);
  void start(const AllToAll& call);
  bool advance(const AllToAll& call);  // true: something was done
  void take_header(const AllToAll& call, int peer);
  void move_data(Kind kind, int peer, void* data, int64_t bytes);
  void add(Kind kind, int peer, MPI_Request request);
  void take_abort();
  void require(int code);
  [[noreturn]] void miss();
  void leave() noexcept;  // nothing of the current call is waited for any more
  int world(int peer) const { return world_ranks_[size_t(peer)]; }

  std::shared_ptr<std::mutex> mpi_;  // held by all below but the destructor of the object itself
  MPI_Comm comm_;
  std::vector<int> world_ranks_;
  std::string name_;
  std::chrono::milliseconds deadline_;
  int rank_ = 0;
  GatherCall gather_;

  // requests_[0] listens for an abort; the others are the current call's, described by parts_.
  std::vector<MPI_Request> requests_;
  std::vector<Part> parts_;
  std::vector<int> indices_;
  std::vector<MPI_Status> statuses_;
  std::vector<Header> headers_in_, headers_out_;
  int pending_ = 0, headers_missing_ = 0;

  AbortMessage abort_in_, abort_out_;
  std::optional<PeerLost> lost_;  // why no call can succeed any more
};

MpiCommunicator::MpiCommunicator(std::shared_ptr<std::mutex> mpi, MPI_Comm comm,
                                 std::vector<int> world_ranks, std::string name,
                                 std::chrono::milliseconds deadline)
    : mpi_(std::move(mpi)),
      comm_(comm),
      world_ranks_(std::move(world_ranks)),
      name_(std::move(name)),
      deadline_(deadline),
      gather_(size()),
      headers_in_(world_ranks_.size()),
      headers_out_(world_ranks_.size()) {
  const size_t most = 1 + 4 * world_ranks_.size();  // more only for messages above kPiece
  requests_.reserve(most);
  parts_.reserve(most);
  indices_.resize(most);
  statuses_.resize(most);
  MPI_Comm_rank(comm_, &rank_);
  requests_.push_back(MPI_REQUEST_NULL);
  parts_.push_back({Kind::header_in, -1});
  MPI_Irecv(&abort_in_, sizeof abort_in_, MPI_BYTE, MPI_ANY_SOURCE, kAbortTag, comm_,
            &requests_[0]);
}

// A group that failed is not freed: messages of its last call may still be on their way, and the
// process is about to end.
MpiCommunicator::~MpiCommunicator() {
  std::lock_guard lock(*mpi_);
  int ended = 0;
  MPI_Finalized(&ended);
  if (ended) return;
  if (requests_[0] != MPI_REQUEST_NULL) {
    MPI_Cancel(&requests_[0]);
    MPI_Wait(&requests_[0], MPI_STATUS_IGNORE);
  }
  if (!lost_) MPI_Comm_free(&comm_);
}

void MpiCommunicator::exchange(const AllToAll& call) {
  const InCall in_call(*this);
  const auto deadline = Clock::now() + deadline_;
  BackOff back_off;
  try {
    {
      std::lock_guard lock(*mpi_);
      start(call);
    }
    if (const int64_t bytes = call.send_bytes[rank_]; bytes > 0) {
      const char* source = static_cast<const char*>(call.send) + call.send_offsets[rank_];
      char* target = static_cast<char*>(call.recv) + call.recv_offsets[rank_];
      if (source != target) std::memcpy(target, source, size_t(bytes));
    }
    for (;;) {
      const auto now = Clock::now();
      {
        std::lock_guard lock(*mpi_);
        const bool moved = advance(call);
        if (pending_ == 0) return;
        if (moved) back_off.progress(headers_missing_ == 0);
        else if (now >= deadline) miss();
      }
      back_off.pause(now);
    }
  } catch (...) {
    std::lock_guard lock(*mpi_);
    leave();
    throw;
  }
}

void MpiCommunicator::start(const AllToAll& call) {
  if (lost_) throw PeerLost(*lost_);
  requests_.resize(1);
  parts_.resize(1);
  pending_ = 0;
  headers_missing_ = size() - 1;
  check(call.send_bytes[rank_] == call.recv_bytes[rank_], "group ", name_, ": rank ", world(rank_),
        " sends ", call.send_bytes[rank_], " bytes to itself, but expects ",
        call.recv_bytes[rank_]);
  const auto bytes = int(sizeof(Header));
  for (int peer = 0; peer < size(); ++peer) {
    if (peer == rank_) continue;
    MPI_Request request;
    require(MPI_Irecv(&headers_in_[size_t(peer)], bytes, MPI_BYTE, peer, kHeaderTag, comm_,
                      &request));
    add(Kind::header_in, peer, request);
  }
  // Each rank begins with its right neighbour, so that not all send to rank 0 at once.
  for (int step = 1; step < size(); ++step) {
    const int peer = (rank_ + step) % size();
    headers_out_[size_t(peer)] = {call.send_bytes[peer], call.recv_bytes[peer]};
    MPI_Request request;
    require(MPI_Isend(&headers_out_[size_t(peer)], bytes, MPI_BYTE, peer, kHeaderTag, comm_,
                      &request));
    add(Kind::header_out, peer, request);
  }
}

// Between calls, or beside one of another thread: listens for an abort alone.
void MpiCommunicator::poll() {
  std::lock_guard lock(*mpi_);
  if (lost_) throw PeerLost(*lost_);
  int aborted = 0;
  require(MPI_Test(&requests_[0], &aborted, MPI_STATUS_IGNORE));
  if (aborted) take_abort();
}

bool MpiCommunicator::advance(const AllToAll& call) {
  if (lost_) throw PeerLost(*lost_);
  if (indices_.size() < requests_.size()) {
    indices_.resize(requests_.size());
    statuses_.resize(requests_.size());
  }
  int done = 0;
  const int code = MPI_Testsome(int(requests_.size()), requests_.data(), &done, indices_.data(),
                                statuses_.data());
  for (int i = 0; code == MPI_ERR_IN_STATUS && i < done; ++i) {
    const int error = statuses_[size_t(i)].MPI_ERROR;
    if (error != MPI_ERR_PENDING) require(error);
  }
  require(code);
  if (done == MPI_UNDEFINED) return false;
  bool aborted = false;
  for (int i = 0; i < done; ++i) {
    if (indices_[size_t(i)] == 0) {
      aborted = true;  // the last to be believed: a header in the same poll may say more
      continue;
    }
    const Part part = parts_[size_t(indices_[size_t(i)])];
    --pending_;
    if (part.kind == Kind::header_in) take_header(call, part.peer);
  }
  if (aborted) take_abort();
  return done > 0;
}

// Data goes out when the receiver is known to be there and to agree, so it never lands in MPI's own
// buffers for want of a receiver.
void MpiCommunicator::take_header(const AllToAll& call, int peer) {
  --headers_missing_;
  const Header theirs = headers_in_[size_t(peer)];
  const int64_t sends = call.send_bytes[peer], expects = call.recv_bytes[peer];
  check(theirs.sends == expects, "group ", name_, ": rank ", world(peer), " sends ", theirs.sends,
        " bytes to rank ", world(rank_), ", which expects ", expects);
  check(theirs.expects == sends, "group ", name_, ": rank ", world(rank_), " sends ", sends,
        " bytes to rank ", world(peer), ", which expects ", theirs.expects);
  move_data(Kind::data_in, peer, static_cast<char*>(call.recv) + call.recv_offsets[peer], expects);
  void* send = const_cast<char*>(static_cast<const char*>(call.send)) + call.send_offsets[peer];
  move_data(Kind::data_out, peer, send, sends);
}

void MpiCommunicator::move_data(Kind kind, int peer, void* data, int64_t bytes) {
  for (int64_t begin = 0; begin < bytes; begin += kPiece) {
    char* piece = static_cast<char*>(data) + begin;
    const int count = int(std::min(kPiece, bytes - begin));
    MPI_Request request;
    require(kind == Kind::data_in
                ? MPI_Irecv(piece, count, MPI_BYTE, peer, kDataTag, comm_, &request)
                : MPI_Isend(piece, count, MPI_BYTE, peer, kDataTag, comm_, &request));
    add(kind, peer, request);
  }
}

void MpiCommunicator::add(Kind kind, int peer, MPI_Request request) {
  requests_.push_back(request);
  parts_.push_back({kind, peer});
  ++pending_;
}

void MpiCommunicator::take_abort() {
  abort_in_.why.back() = '\0';
  const auto why = concat("stopped: ", abort_in_.why.data());
  if (!lost_) lost_ = PeerLost(name_, abort_in_.world_rank, why);
  throw PeerLost(*lost_);
}

void MpiCommunicator::require(int code) {
  if (code == MPI_SUCCESS) return;
  if (!lost_) lost_ = PeerLost(name_, -1, describe(code));
  throw PeerLost(*lost_);
}

void MpiCommunicator::miss() {
  std::vector<int> missing;
  for (size_t i = 1; i < requests_.size(); ++i) {
    const bool counts = headers_missing_ == 0 || parts_[i].kind == Kind::header_in;
    if (requests_[i] != MPI_REQUEST_NULL && counts) missing.push_back(world(parts_[i].peer));
  }
  std::ranges::sort(missing);
  missing.erase(std::ranges::unique(missing).begin(), missing.end());
  std::string list;
  for (int r : missing) list += (list.empty() ? "" : ", ") + std::to_string(r);
  lost_ = PeerLost(name_, missing.size() == 1 ? missing[0] : -1,
                   concat("nothing heard for ", deadline_.count(), " ms from rank ", list));
  throw PeerLost(*lost_);
}

void MpiCommunicator::leave() noexcept {
  if (!lost_) lost_ = PeerLost(name_, world(rank_), "an earlier call of this rank failed");
  for (size_t i = 1; i < requests_.size(); ++i) {
    if (requests_[i] == MPI_REQUEST_NULL) continue;
    const Kind kind = parts_[i].kind;
    if (kind == Kind::header_in || kind == Kind::data_in) MPI_Cancel(&requests_[i]);
    MPI_Request_free(&requests_[i]);
  }
  requests_.resize(1);
  parts_.resize(1);
}

void MpiCommunicator::abort(const std::string& why) noexcept {
  std::vector<MPI_Request> sends(world_ranks_.size(), MPI_REQUEST_NULL);
  {
    std::lock_guard lock(*mpi_);
    if (abort_out_.world_rank >= 0) return;
    abort_out_.world_rank = world(rank_);
    std::copy_n(why.data(), std::min(why.size(), abort_out_.why.size() - 1),
                abort_out_.why.begin());
    if (!lost_) lost_ = PeerLost(name_, world(rank_), "stopped: " + why);
    for (int peer = 0; peer < size(); ++peer)
      if (peer != rank_)
        MPI_Isend(&abort_out_, sizeof abort_out_, MPI_BYTE, peer, kAbortTag, comm_,
                  &sends[size_t(peer)]);
  }
  // A connection that was never used must be made first: progress is made by polling. A peer that
  // cannot be reached within a second will find out by its own deadline.
  const auto end = Clock::now() + std::chrono::seconds(1);
  for (int done = 0; Clock::now() < end;) {
    {
      std::lock_guard lock(*mpi_);
      MPI_Testall(int(sends.size()), sends.data(), &done, MPI_STATUSES_IGNORE);
    }
    if (done) return;
    std::this_thread::sleep_for(microseconds(100));
  }
}

}  // namespace

std::unique_ptr<Communicator> make_mpi_communicator(std::shared_ptr<std::mutex> mpi,
                                                    std::vector<int> world_ranks, std::string name,
                                                    std::chrono::milliseconds deadline) {
  std::lock_guard lock(*mpi);
  MPI_Group world, members;
  MPI_Comm comm = MPI_COMM_NULL;
  MPI_Comm_group(MPI_COMM_WORLD, &world);
  MPI_Group_incl(world, int(world_ranks.size()), world_ranks.data(), &members);
  const int code = MPI_Comm_create_group(MPI_COMM_WORLD, members, kHeaderTag, &comm);
  MPI_Group_free(&members);
  MPI_Group_free(&world);
  check(code == MPI_SUCCESS, "group ", name, ": could not be made: ", describe(code));
  MPI_Comm_set_errhandler(comm, MPI_ERRORS_RETURN);
  return std::make_unique<MpiCommunicator>(mpi, comm, std::move(world_ranks), std::move(name),
                                           deadline);
}

}  // namespace moemamba
