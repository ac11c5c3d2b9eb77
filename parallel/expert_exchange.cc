#include "parallel/expert_exchange.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace moemamba {

namespace {

using Clock = std::chrono::steady_clock;

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows as bytes. The padding after the last row of a block is never touched, so that one row needs
// no stride at all.
struct Block {
  char* data;
  int64_t stride;  // bytes from row to row
  int64_t width;   // bytes of a row

  explicit Block(const Tensor& tensor)
      : data(static_cast<char*>(tensor.data)),
        stride(tensor.stride * size_of(tensor.dtype)),
        width(tensor.cols() * size_of(tensor.dtype)) {}
  char* row(int64_t r) const { return data + r * stride; }
  int64_t bytes(int64_t rows) const { return rows == 0 ? 0 : (rows - 1) * stride + width; }
  Tensor rows_on_device(int64_t rows) const {
    return {.data = data,
            .shape = {rows, width},
            .stride = stride,
            .dtype = DType::u8,
            .device = DeviceKind::cuda};
  }
};

}  // namespace

// One chunk on its way out (dispatch) or back (combine).
struct ExpertExchange::Move {
  int64_t chunk;
  Block rows;       // of this rank, sorted by expert
  Block staging;    // what came from, or goes to, the other ranks: sorted by source
  Block local;      // the chunk: sorted by expert, then source
  int32_t* offsets; // of the chunk, written by dispatch; null on the way back
  bool out;         // dispatch
};

ExpertExchange::ExpertExchange(Communicator& group, const RankLayout& layout, int64_t capacity,
                               int64_t max_rows, DeviceKind device)
    : group_(group),
      layout_(layout),
      capacity_(capacity),
      max_rows_(max_rows),
      device_(device) {
  const auto M = size_t(group.size()), E = size_t(layout.experts());
  check(layout.expert_size() == group.size(), "expert exchange: the layout has ",
        layout.expert_size(), " ranks that share experts, the group has ", group.size());
  check(capacity >= 1, "exchange_rows must be at least 1, found ", capacity);
  check(max_rows >= 0, "a rank sends at least 0 rows, found ", max_rows);
  offsets_.resize(M * (E + 1));
  numbers_.resize(M * E);
  sent_.resize(M);
  staged_.resize(M);
  for (auto* list : {&sent_places_, &sent_bytes_, &staged_places_, &staged_bytes_}) list->resize(M);
  const auto local = size_t(layout.experts_of(group.rank()));
  begins_.resize(local + 1);
  if (device == DeviceKind::cpu) return;
  own_segments_.reserve(local);
  staged_segments_.reserve(local * M);
}

int64_t ExpertExchange::most_chunks() const {
  return std::max<int64_t>(1, ceil_divide(group_.size() * max_rows_, capacity_));
}

int64_t ExpertExchange::count(int64_t source, int64_t expert) const {
  const int32_t* offsets = offsets_.data() + source * (layout_.experts() + 1) + expert;
  return offsets[1] - offsets[0];
}

// Which of the rows that `source` sends to `expert` travel in `chunk`, counted from its first one.
ExpertExchange::Interval ExpertExchange::within(int64_t chunk, int64_t source,
                                                int64_t expert) const {
  const int64_t first = number(source, expert), rows = count(source, expert);
  const int64_t begin = std::clamp<int64_t>(chunk * capacity_ - first, 0, rows);
  return {begin, std::clamp<int64_t>((chunk + 1) * capacity_ - first, begin, rows)};
}

bool ExpertExchange::rows_stay() const {
  return device_ == DeviceKind::cuda && group_.size() == 1 && capacity_ >= max_rows_;
}

void ExpertExchange::plan(Stream& stream, const Tensor& offsets) {
  const int64_t E = layout_.experts();
  expect("offsets[E + 1]", offsets, {E + 1}, DType::i32);
  own_offsets_ = offsets;
  if (stream.is_dry()) {
    chunks_ = std::min<int64_t>(2, most_chunks());
    received_ = chunks_ * capacity_;
    return;
  }
  check(stream.device() == device_, "expert exchange: made for streams of the ",
        device_ == DeviceKind::cpu ? "CPU" : "GPU");
  if (rows_stay()) {
    chunks_ = 1;
    received_ = max_rows_;
  } else {
    const Observed observed(stream, "exchange");
    const InPhase in_phase(group_.activity(), Phase::exchange);
    gather_offsets(stream, offsets);
    number_rows();
  }
  planned_rows_ += received_;
}

// Into offsets_; the host waits (house.md, decision 13).
void ExpertExchange::gather_offsets(Stream& stream, const Tensor& offsets) {
  if (device_ == DeviceKind::cuda) {
    const auto count = int64_t(offsets_.size()), bytes = count * int64_t(sizeof(int32_t));
    if (!gathered_.data()) {
      gathered_ = Buffer(DeviceKind::cuda, bytes);
      staging_ = Buffer::staging(DeviceKind::cuda, bytes);
    }
    group_.all_gather(stream, offsets.data, gathered_.data(), offsets.bytes());
    const Tensor host = view(staging_.data(), {count}, DType::i32);
    copy(stream, view(gathered_, 0, {count}, DType::i32), host);
    stream.synchronize();
    std::copy_n(host.as<int32_t>(), count, offsets_.begin());
    return;
  }
  stream.submit([this] { started_ = Clock::now(); });
  group_.all_gather(stream, offsets.data, offsets_.data(), offsets.bytes());
  stream.submit([this] {
    nanoseconds_ += std::chrono::nanoseconds(Clock::now() - started_).count();
  });
  stream.synchronize();
}

void ExpertExchange::keep(Plan& plan) const {
  plan.offsets = own_offsets_;
  plan.chunks = chunks_;
  plan.received = received_;
  if (!rows_stay()) plan.all_offsets.assign(offsets_.begin(), offsets_.end());
}

void ExpertExchange::use(const Plan& plan) {
  own_offsets_ = plan.offsets;
  if (!plan.all_offsets.empty() && plan.all_offsets != offsets_) {
    check(plan.all_offsets.size() == offsets_.size(), "expert exchange: a plan of another one");
    std::ranges::copy(plan.all_offsets, offsets_.begin());
    number_rows();
  }
  chunks_ = plan.chunks;
  received_ = plan.received;
}

// Numbers by (expert, source, row) at every receiver, so that all ranks know every chunk of all.
void ExpertExchange::number_rows() {
  const int64_t M = group_.size(), E = layout_.experts();
  for (int64_t r = 0; r < M; ++r) {
    const int32_t* offsets = offsets_.data() + r * (E + 1);
    check(offsets[0] == 0 && std::is_sorted(offsets, offsets + E + 1),
          "expert exchange: offsets of rank ", r, " of the group must start at 0 and not fall");
  }
  const int64_t sends = offsets_[size_t(group_.rank() * (E + 1) + E)];
  check(sends <= max_rows_, "expert exchange: made for ", max_rows_, " rows, asked for ", sends);
  chunks_ = 1;
  for (int d = 0; d < M; ++d) {
    int64_t next = 0;
    for (int64_t e = layout_.first_expert(d); e < layout_.first_expert(d + 1); ++e) {
      for (int64_t r = 0; r < M; ++r) {
        numbers_[size_t(r * E + e)] = next;
        next += count(r, e);
      }
    }
    chunks_ = std::max(chunks_, ceil_divide(next, capacity_));
    if (d == group_.rank()) received_ = next;
  }
}

// A sender's rows are sorted by expert and so are their numbers: what one receiver gets of them in
// one chunk is one interval.
void ExpertExchange::place(const Move& move) const {
  const int64_t M = group_.size(), me = group_.rank();
  const int32_t* mine = offsets_.data() + me * (layout_.experts() + 1);
  int64_t staged = 0;
  for (int d = 0; d < M; ++d) {
    const int64_t first = layout_.first_expert(d), last = layout_.first_expert(d + 1);
    Interval& sent = sent_[size_t(d)];
    sent = {mine[first], mine[first]};
    for (int64_t e = first; e < last; ++e) {
      const Interval part = within(move.chunk, me, e);
      if (part.begin == part.end) continue;
      if (sent.begin == sent.end) sent.begin = mine[e] + part.begin;
      sent.end = mine[e] + part.end;
    }
    int64_t comes = 0;
    for (int64_t e = layout_.first_expert(int(me)); e < layout_.first_expert(int(me) + 1); ++e) {
      const Interval part = within(move.chunk, d, e);
      comes += part.end - part.begin;
    }
    staged_[size_t(d)] = {staged, staged + comes};
    staged += comes;

    const auto i = size_t(d);
    sent_places_[i] = sent.begin * move.rows.stride;
    sent_bytes_[i] = d == me ? 0 : move.rows.bytes(sent.end - sent.begin);
    staged_places_[i] = staged_[i].begin * move.staging.stride;
    staged_bytes_[i] = d == me ? 0 : move.staging.bytes(comes);
  }
}

// Where an expert of this rank, or what comes behind the last one, begins within the chunk.
int64_t ExpertExchange::begin_of(int64_t chunk, int64_t expert) const {
  const bool behind = expert == layout_.first_expert(group_.rank() + 1);
  const int64_t at = behind ? received_ : number(0, expert);
  return std::clamp<int64_t>(at - chunk * capacity_, 0, capacity_);
}

// Calls body(waiting, at, rows) for what one source sends to each expert of this rank: rows of
// staging (or of this rank's own rows) from `waiting`, rows of the chunk from `at`.
template <class Body>
void ExpertExchange::for_parts(const Move& move, int64_t source, Body body) const {
  const int me = group_.rank();
  int64_t waiting = (source == me ? sent_ : staged_)[size_t(source)].begin;
  for (int64_t e = layout_.first_expert(me); e < layout_.first_expert(me + 1); ++e) {
    const Interval part = within(move.chunk, source, e);
    const int64_t rows = part.end - part.begin;
    if (rows == 0) continue;
    body(waiting, number(source, e) + part.begin - move.chunk * capacity_, rows);
    waiting += rows;
  }
}

// Rows between the chunk and where they wait: staging, or this rank's own rows.
void ExpertExchange::copy_chunk(Stream& stream, const Move& move) const {
  const int64_t me = group_.rank(), first = layout_.first_expert(int(me));
  if (move.out)
    for (size_t e = 0; e < begins_.size(); ++e)
      begins_[e] = int32_t(begin_of(move.chunk, first + int64_t(e)));
  if (device_ == DeviceKind::cuda) return copy_on_device(stream, move);
  if (move.out) std::ranges::copy(begins_, move.offsets);
  stream.parallel_for(group_.size(), [&](int64_t source) {
    const Block& from = source == me ? move.rows : move.staging;
    for_parts(move, source, [&](int64_t waiting, int64_t at, int64_t rows) {
      char *chunk = move.local.row(at), *wait = from.row(waiting);
      std::memcpy(move.out ? chunk : wait, move.out ? wait : chunk, size_t(from.bytes(rows)));
    });
  });
}

// The same as two kernels over tables of segments; neighbours on both sides become one.
void ExpertExchange::copy_on_device(Stream& stream, const Move& move) const {
  own_segments_.clear();
  staged_segments_.clear();
  for (int source = 0; source < group_.size(); ++source) {
    auto& list = source == group_.rank() ? own_segments_ : staged_segments_;
    for_parts(move, source, [&](int64_t waiting, int64_t at, int64_t rows) {
      const auto from = int32_t(move.out ? waiting : at), to = int32_t(move.out ? at : waiting);
      const bool follows = !list.empty() && list.back().from + list.back().rows == from &&
                           list.back().to + list.back().rows == to;
      if (follows)
        list.back().rows += int32_t(rows);
      else
        list.push_back({from, to, int32_t(rows)});
    });
  }
  if (move.out) device_work::write_integers(stream, begins_, move.offsets);
  const Tensor chunk = move.local.rows_on_device(capacity_);
  const auto copy_between = [&](const auto& segments, const Tensor& waiting) {
    device_work::copy_segments(stream, segments, move.out ? waiting : chunk,
                               move.out ? chunk : waiting);
  };
  copy_between(own_segments_, move.rows.rows_on_device(max_rows_));
  copy_between(staged_segments_, move.staging.rows_on_device(capacity_));
}

// For those who watch this rank: rows of other ranks that this call brings.
void ExpertExchange::tell_begin(const Move& move) const {
  expected_ = 0;
  for (size_t r = 0; r < sent_.size(); ++r) {
    if (int(r) == group_.rank()) continue;
    const Interval& comes = (move.out ? staged_ : sent_)[r];
    expected_ += comes.end - comes.begin;
  }
  before_ = group_.activity()->phase();
  group_.activity()->enter(Phase::exchange);
  group_.activity()->expect_rows(expected_);
}

void ExpertExchange::tell_end() const {
  group_.activity()->expect_rows(-1);
  group_.activity()->enter(before_);
}

void ExpertExchange::exchange(Stream& stream, const Move& move) const {
  const Observed observed(stream, "exchange");
  stream.submit([this, &stream, move] {
    started_ = Clock::now();
    place(move);
    if (group_.activity()) tell_begin(move);
    if (!move.out) copy_chunk(stream, move);
  });
  if (group_.size() > 1) {
    Communicator::AllToAll call{.send = move.rows.data,
                                .send_offsets = sent_places_.data(),
                                .send_bytes = sent_bytes_.data(),
                                .recv = move.staging.data,
                                .recv_offsets = staged_places_.data(),
                                .recv_bytes = staged_bytes_.data()};
    if (!move.out)
      call = {.send = move.staging.data,
              .send_offsets = staged_places_.data(),
              .send_bytes = staged_bytes_.data(),
              .recv = move.rows.data,
              .recv_offsets = sent_places_.data(),
              .recv_bytes = sent_bytes_.data()};
    group_.all_to_all(stream, call);
  }
  stream.submit([this, &stream, move] {
    if (group_.activity()) group_.activity()->receive_rows(expected_);
    if (move.out) copy_chunk(stream, move);
    if (group_.activity()) tell_end();
    if (device_ == DeviceKind::cpu)  // a GPU's work goes on
      nanoseconds_ += std::chrono::nanoseconds(Clock::now() - started_).count();
  });
}

void ExpertExchange::dispatch(Stream& stream, int64_t chunk, const Tensor& rows, const Rows& out,
                              const Tensor& staging) const {
  check_move(chunk, rows, out.values, staging);
  expect("out.offsets[E' + 1]", out.offsets, {layout_.experts_of(group_.rank()) + 1}, DType::i32);
  if (stream.is_dry()) return;
  if (rows_stay()) {
    const Observed observed(stream, "exchange");
    const int32_t* count = own_offsets_.as<int32_t>() + layout_.experts();
    if (rows.data != out.values.data)
      device_work::copy_first_rows(stream, rows, count, out.values);
    return copy(stream, own_offsets_, out.offsets);
  }
  exchange(stream, {.chunk = chunk,
                    .rows = Block(rows),
                    .staging = Block(staging),
                    .local = Block(out.values),
                    .offsets = out.offsets.as<int32_t>(),
                    .out = true});
}

void ExpertExchange::combine(Stream& stream, int64_t chunk, const Rows& rows, const Tensor& out,
                             const Tensor& staging) const {
  check_move(chunk, out, rows.values, staging);
  if (stream.is_dry()) return;
  if (rows_stay()) {
    const Observed observed(stream, "exchange");
    const int32_t* count = own_offsets_.as<int32_t>() + layout_.experts();
    if (rows.values.data != out.data)
      device_work::copy_first_rows(stream, rows.values, count, out);
    return;
  }
  exchange(stream, {.chunk = chunk,
                    .rows = Block(out),
                    .staging = Block(staging),
                    .local = Block(rows.values),
                    .offsets = nullptr,
                    .out = false});
}

void ExpertExchange::check_move(int64_t chunk, const Tensor& rows, const Tensor& local,
                                const Tensor& staging) const {
  const auto [S, D] = dims<2>("rows[S, D]", rows);
  check(chunk >= 0 && chunk < chunks_, "chunk ", chunk, " of a plan with ", chunks_);
  check(S <= max_rows_, "rows[S, D]: made for ", max_rows_, " rows, found ", to_string(rows.shape));
  expect("chunk[C, D]", local, {capacity_, D}, rows.dtype);
  expect("staging[C, D]", staging, {capacity_, D}, rows.dtype);
  // Rows travel with their padding; a tensor of one row has none.
  const bool same = (S < 2 || capacity_ < 2 || rows.stride == local.stride) &&
                    (capacity_ < 2 || local.stride == staging.stride);
  check(same, "rows, chunk and staging must be padded alike: strides ", rows.stride, ", ",
        local.stride, " and ", staging.stride);
}

int64_t ExpertExchange::take_rows() {
  return std::exchange(planned_rows_, 0);
}

double ExpertExchange::take_seconds() { return double(nanoseconds_.exchange(0)) * 1e-9; }

}  // namespace moemamba
