#include "tests/support/communicator_suite.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <thread>

#include "core/arena.h"
#include "core/random.h"

namespace moemamba {

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

using Bytes = std::vector<std::byte>;

// Memory where the stream works, which the host fills and reads.
class Memory {
 public:
  Memory(Stream& stream, const Bytes& content)
      : stream_(stream), buffer_(stream.device(), int64_t(content.size())) {
    if (content.empty()) return;
    copy(stream_, on_host(const_cast<std::byte*>(content.data())), all());
    stream_.synchronize();
  }
  std::byte* data() const { return buffer_.data(); }
  Tensor all() const { return view(buffer_, 0, {buffer_.bytes()}, DType::u8); }
  Bytes read() const {
    Bytes content(size_t(buffer_.bytes()));
    if (content.empty()) return content;
    copy(stream_, all(), on_host(content.data()));
    stream_.synchronize();
    return content;
  }

 private:
  Tensor on_host(std::byte* data) const { return view(data, {buffer_.bytes()}, DType::u8); }
  Stream& stream_;
  Buffer buffer_;
};

template <class Number>
Bytes bytes_of(const std::vector<Number>& numbers) {
  Bytes bytes(numbers.size() * sizeof(Number));
  std::memcpy(bytes.data(), numbers.data(), bytes.size());
  return bytes;
}

// One all-to-all whose sizes and bytes every rank can compute for every other.
class Exchange {
 public:
  using Count = std::function<int64_t(int from, int to)>;

  Exchange(Communicator& group, Stream& stream, uint64_t seed, const Count& count)
      : group_(group),
        stream_(stream),
        seed_(seed),
        size_(size_t(group.size())),
        send_at_(size_),
        send_(size_),
        recv_at_(size_),
        recv_(size_) {
    const int me = group.rank();
    int64_t out = 0, in = 0;
    for (int r = 0; r < group.size(); ++r) {
      const auto i = size_t(r);
      send_at_[i] = out;
      send_[i] = count(me, r);
      out += send_[i] + 3;  // gaps: offsets are more than sums of counts
      recv_at_[i] = in;
      recv_[i] = count(r, me);
      in += recv_[i] + 5;
    }
    Bytes sent(static_cast<size_t>(out));
    for (int r = 0; r < group.size(); ++r)
      for (int64_t i = 0; i < send_[size_t(r)]; ++i)
        sent[size_t(send_at_[size_t(r)] + i)] = value(me, r, i);
    sent_.emplace(stream, sent);
    received_.emplace(stream, Bytes(size_t(in), std::byte{0xee}));
  }

  void start() {
    group_.all_to_all(stream_, {.send = sent_->data(),
                                .send_offsets = send_at_.data(),
                                .send_bytes = send_.data(),
                                .recv = received_->data(),
                                .recv_offsets = recv_at_.data(),
                                .recv_bytes = recv_.data()});
  }
  void verify() const {
    const Bytes received = received_->read();
    for (int r = 0; r < group_.size(); ++r) {
      const int64_t at = recv_at_[size_t(r)], bytes = recv_[size_t(r)];
      for (int64_t i = 0; i < bytes; ++i)
        check(received[size_t(at + i)] == value(r, group_.rank(), i), "byte ", i, " of ", bytes,
              " from rank ", r, " is wrong");
      for (int64_t i = bytes; i < bytes + 5; ++i)
        check(received[size_t(at + i)] == std::byte{0xee}, "written behind the bytes of rank ", r);
    }
  }

 private:
  std::byte value(int from, int to, int64_t i) const {
    return std::byte((seed_ * 7 + uint64_t(from) * 31 + uint64_t(to) * 17 + uint64_t(i) * 13) >> 1);
  }
  Communicator& group_;
  Stream& stream_;
  uint64_t seed_;
  size_t size_;
  std::vector<int64_t> send_at_, send_, recv_at_, recv_;
  std::optional<Memory> sent_, received_;
};

void exchange(Communicator& group, Stream& stream, uint64_t seed, const Exchange::Count& count) {
  Exchange call(group, stream, seed, count);
  call.start();
  stream.synchronize();
  call.verify();
}

void uneven(Communicator& group, Stream& stream) {
  for (uint64_t round = 0; round < 30; ++round) {
    const Random random(round, "sizes");
    exchange(group, stream, round, [&](int from, int to) {
      const auto pair = uint64_t(from * 64 + to);
      return int64_t(random.integer(pair, 3) * random.integer(1000 + pair, 5000));
    });
  }
}

void several_at_once(Communicator& group, Stream& stream) {
  const auto count = [](int from, int to) { return int64_t(100 * from + to); };
  Exchange first(group, stream, 1, count), second(group, stream, 2, count);
  Exchange third(group, stream, 3, count);
  for (Exchange* call : {&first, &second, &third}) call->start();
  stream.synchronize();
  for (Exchange* call : {&first, &second, &third}) call->verify();
}

void zero(Communicator& group, Stream& stream) {
  exchange(group, stream, 0, [](int, int) { return 0; });
  exchange(group, stream, 0, [](int from, int) { return from == 0 ? 7 : 0; });  // one sends
  exchange(group, stream, 0, [](int, int to) { return to == 0 ? 7 : 0; });      // one receives
}

void large(Communicator& group, Stream& stream) {
  exchange(group, stream, 5, [](int from, int to) { return 1500000 + 1000 * from + to; });
  // Above the size at which one message is cut into several.
  exchange(group, stream, 6,
           [](int from, int to) { return from == 0 && to == 1 ? int64_t{70} << 20 : int64_t{10}; });
}

void gather(Communicator& group, Stream& stream) {
  for (int64_t bytes : {int64_t{1}, int64_t{0}, int64_t{1000}, int64_t{1} << 20}) {
    const Bytes own(size_t(bytes), std::byte(group.rank() + 1));
    Bytes nothing(size_t(bytes * group.size()));
    const Memory mine(stream, own), all(stream, nothing);
    const int64_t place = group.rank() * bytes;
    std::ranges::copy(own, nothing.begin() + place);
    const Memory in_place(stream, nothing);
    group.all_gather(stream, mine.data(), all.data(), bytes);
    group.all_gather(stream, in_place.data() + place, in_place.data(), bytes);
    stream.synchronize();
    const Bytes gathered = all.read();
    for (size_t i = 0; i < gathered.size(); ++i)
      check(gathered[i] == std::byte(int64_t(i) / bytes + 1), "gathered byte ", i, " is wrong");
    check(gathered == in_place.read(), "in place gathers something else");
  }
}

template <class Number>
void sum_of(Communicator& group, Stream& stream, int64_t count) {
  const auto value = [](int rank, int64_t i) {
    return Number(1e3 * Random(uint64_t(rank), "sum").normal(uint64_t(i)));
  };
  std::vector<Number> values(static_cast<size_t>(count)), expected(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    values[size_t(i)] = value(group.rank(), i);
    expected[size_t(i)] = value(0, i);
    for (int r = 1; r < group.size(); ++r) expected[size_t(i)] += value(r, i);
  }
  const int64_t bytes = count * int64_t(sizeof(Number));
  const Memory sums(stream, bytes_of(values));
  const Memory workspace(stream, Bytes(size_t(bytes * group.size())));
  all_reduce_sum(group, stream, view(sums.data(), {count}, dtype_of<Number>(), stream.device()),
                 workspace.all());
  stream.synchronize();
  check(sums.read() == bytes_of(expected), "a sum of ", count,
        " elements differs from the sum in rank order");
}

void sum(Communicator& group, Stream& stream) {
  for (int64_t count : {1, 7, 1024, 5000}) {
    sum_of<float>(group, stream, count);
    sum_of<double>(group, stream, count);
    sum_of<int64_t>(group, stream, count);
  }
}

void barriers(Communicator& group, Stream& stream) {
  for (int i = 0; i < 100; ++i) barrier(group, stream);
  stream.synchronize();
}

// What `body` throws must be PeerLost of this group naming `rank` with `why` in its text.
void expect_lost(Communicator& group, int rank, const char* why,
                 const std::function<void()>& body) {
  try {
    body();
  } catch (const PeerLost& error) {
    check(error.group() == group.name(), "PeerLost names group ", error.group());
    check(error.rank() == rank, "expected the loss of rank ", rank, ", found: ", error.what());
    check(std::string(error.what()).find(why) != std::string::npos, "expected \"", why,
          "\" in: ", error.what());
    return;
  }
  check(false, "expected the loss of rank ", rank, ", but the call succeeded");
}

void abort_wakes(Communicator& group, Stream& stream) {
  if (group.size() == 1) return;
  barrier(group, stream);
  stream.synchronize();
  const int failing = group.size() - 1;
  const auto start = Clock::now();
  if (group.rank() == failing) {
    std::this_thread::sleep_for(milliseconds(100));
    group.abort("disk full");
  }
  expect_lost(group, failing, "disk full", [&] {
    barrier(group, stream);
    stream.synchronize();
  });
  expect_lost(group, failing, "disk full", [&] {  // the group stays lost
    Stream again = Stream::immediate();
    barrier(group, again);
  });
  check(Clock::now() - start < std::chrono::seconds(10), "woken too late");
}

constexpr milliseconds kLate(2000);  // far above what eight ranks on two busy cores need

// Rank 0 does not come.
void late(Communicator& group, Stream& stream) {
  if (group.size() == 1) return;
  barrier(group, stream);  // all others are there
  stream.synchronize();
  if (group.rank() == 0) return;
  const auto start = Clock::now();
  expect_lost(group, 0, "nothing heard for 2000 ms", [&] {
    barrier(group, stream);
    stream.synchronize();
  });
  const auto took = Clock::now() - start;
  check(took > kLate / 2 && took < std::chrono::seconds(30), "the deadline was not kept");
}

// Rank 1 expects a byte more of rank 0 than that one sends.
void mismatch(Communicator& group, Stream& stream) {
  if (group.size() == 1) return;
  try {
    exchange(group, stream, 1, [&](int from, int to) {
      return 20 + (from == 0 && to == 1 && group.rank() == 1 ? 1 : 0);
    });
  } catch (const PeerLost&) {
    check(group.rank() > 1, "expected an Error at the two ranks that do not agree");
    return;
  } catch (const Error& error) {
    group.abort(error.what());
    check(group.rank() <= 1, "expected PeerLost at a rank that agrees, found: ", error.what());
    const char* expected = "rank 0 sends 20 bytes to rank 1, which expects 21";
    check(std::string(error.what()).find(expected) != std::string::npos, "expected \"", expected,
          "\", found: ", error.what());
    return;
  }
  // Over MPI a rank may have all that it needs before it hears of the mismatch.
  check(group.rank() > 1, "a mismatch of counts was not noticed");
}

}  // namespace

std::vector<CommunicatorCase> communicator_cases() {
  const std::chrono::milliseconds patient = std::chrono::seconds(60);
  return {{"uneven", patient, uneven},     {"several_at_once", patient, several_at_once},
          {"zero", patient, zero},         {"large", patient, large},
          {"gather", patient, gather},     {"sum", patient, sum},
          {"barriers", patient, barriers}, {"abort_wakes", patient, abort_wakes},
          {"late", kLate, late},           {"mismatch", patient, mismatch}};
}

}  // namespace moemamba
