#include "runtime/bench_exchange.h"

#include <algorithm>
#include <cstdio>

#include "runtime/bench_tools.h"

namespace moemamba {

namespace {

constexpr const char *kEven = "even", *kOne = "one expert";

// What one rank moves; all ranks have the same counts.
class ExchangeCase {
 public:
  ExchangeCase(ProcessGroups& groups, Stream& stream, const ModelSizes& sizes)
      : groups_(groups), group_(*groups.expert), stream_(stream), sizes_(sizes) {}
  ExchangeBench::Row measure(const char* routing, double megabytes,
                             const ExchangeBenchOptions& options);

 private:
  int64_t sent_to(int rank) const {
    const RankLayout& layout = groups_.layout;
    return offsets_[size_t(layout.first_expert(rank + 1))] -
           offsets_[size_t(layout.first_expert(rank))];
  }
  void share_out(const char* routing, int64_t leaving);
  double plain(const Tensor& rows, BenchTensors& tensors, int64_t repeat);
  double slowest(double own);
  void meet() { barrier(*groups_.control, host_); }

  ProcessGroups& groups_;
  Communicator& group_;
  Stream& stream_;
  Stream host_ = Stream::immediate();
  const ModelSizes& sizes_;
  std::vector<int32_t> offsets_;  // [E + 1]
};

// Of the rank that sends the most, `leaving` rows go to others. Evenly: a rank keeps its share.
void ExchangeCase::share_out(const char* routing, int64_t leaving) {
  const int64_t M = group_.size(), E = sizes_.E;
  const bool even = routing == kEven;
  const int64_t all = even ? (leaving * M + M - 2) / (M - 1) : leaving;
  check(all < INT32_MAX, "bench exchange: ", all, " rows are more than 2^31; fewer megabytes");
  offsets_ = {0};
  for (int64_t e = 0; e < E; ++e)
    offsets_.push_back(int32_t(even ? all * (e + 1) / E : e + 1 == E ? all : 0));
}

double ExchangeCase::slowest(double own) {
  std::vector<double> all(size_t(groups_.layout.ranks()));
  groups_.control->all_gather(host_, &own, all.data(), sizeof own);
  host_.synchronize();
  return *std::max_element(all.begin(), all.end());
}

// What dispatch sends, by one call and nothing else.
double ExchangeCase::plain(const Tensor& rows, BenchTensors& tensors, int64_t repeat) {
  const auto M = size_t(group_.size()), me = size_t(group_.rank());
  const int64_t row_bytes = rows.stride * size_of(rows.dtype);
  std::vector<int64_t> sent_places(M), sent_bytes(M), places(M), bytes(M);
  int64_t comes = 0;
  for (size_t r = 0; r < M; ++r) {
    sent_places[r] = offsets_[size_t(groups_.layout.first_expert(int(r)))] * row_bytes;
    sent_bytes[r] = r == me ? 0 : sent_to(int(r)) * row_bytes;
    places[r] = comes;
    bytes[r] = r == me ? 0 : sent_to(int(me)) * row_bytes;
    comes += bytes[r];
  }
  const Tensor to = tensors.dense({std::max<int64_t>(1, comes / size_of(rows.dtype))}, rows.dtype);
  const Communicator::AllToAll call{.send = rows.data,
                                    .send_offsets = sent_places.data(),
                                    .send_bytes = sent_bytes.data(),
                                    .recv = to.data,
                                    .recv_offsets = places.data(),
                                    .recv_bytes = bytes.data()};
  const double seconds = median(time_runs(
      stream_, repeat, [&] { group_.all_to_all(stream_, call); }, [this] { meet(); }));
  stream_.synchronize();  // before what the call points at ends
  return slowest(seconds);
}

ExchangeBench::Row ExchangeCase::measure(const char* routing, double megabytes,
                                         const ExchangeBenchOptions& options) {
  const int M = group_.size();
  BenchTensors tensors(stream_);
  const int64_t row_bytes =
      tensors.rows({1, sizes_.D}, sizes_.compute).stride * size_of(sizes_.compute);
  share_out(routing, std::max<int64_t>(1, int64_t(megabytes * 1e6 / double(row_bytes))));
  const int64_t S = offsets_.back();
  ModelSizes each_once = sizes_;
  each_once.K = 1;
  const int64_t C = exchange_capacity(each_once, S, options.exchange_rows, M);
  ExpertExchange exchange(group_, groups_.layout, C, S, stream_.device());
  const auto take = [&](int64_t count) { return tensors.rows({count, sizes_.D}, sizes_.compute); };
  const Tensor rows = take(S), back = take(S), staging = take(C),
               offsets = tensors.values(offsets_);
  const Rows chunk{take(C),
                   tensors.zeros({groups_.layout.experts_of(group_.rank()) + 1}, DType::i32)};

  int64_t most = 0;
  for (int r = 0; r < M; ++r) most = std::max(most, S - sent_to(r));
  ExchangeBench::Row row{.routing = routing, .bytes = double(most * row_bytes)};
  const auto before = [this] { meet(); };
  row.plan = slowest(median(time_on_host(
      options.repeat, [&] { exchange.plan(stream_, offsets); }, before)));
  row.chunks = exchange.chunks();
  row.dispatch = slowest(median(time_runs(
      stream_, options.repeat,
      [&] {
        for (int64_t i = 0; i < exchange.chunks(); ++i)
          exchange.dispatch(stream_, i, rows, chunk, staging);
      },
      before)));
  row.combine = slowest(median(time_runs(
      stream_, options.repeat,
      [&] {
        for (int64_t i = 0; i < exchange.chunks(); ++i)
          exchange.combine(stream_, i, chunk, back, staging);
      },
      before)));
  row.plain = plain(rows, tensors, options.repeat);
  stream_.synchronize();
  return row;
}

}  // namespace

ExchangeBench bench_exchange(ProcessGroups& groups, const ModelSizes& sizes,
                             const ExchangeBenchOptions& options) {
  check(groups.expert->size() > 1,
        "bench exchange: one rank has all experts, and nothing leaves "
        "it; start two or more that share them");
  const bool on_gpu = groups.device == DeviceKind::cuda;
  Stream stream = on_gpu ? Stream::cuda() : Stream::immediate(options.threads);
  if (on_gpu) stream.watch([&groups] { groups.poll(); });
  ExchangeBench bench;
  bench.what = concat(groups.expert->size(), on_gpu ? " GPUs" : " ranks on CPUs", " share ",
                      sizes.E, " experts; rows of ", sizes.D, " ", name_of(sizes.compute),
                      ", room for ", options.exchange_rows, " times the even share");
  ExchangeCase one(groups, stream, sizes);
  for (const char* routing : {kEven, kOne})
    for (double megabytes : options.megabytes)
      bench.rows.push_back(one.measure(routing, megabytes, options));
  return bench;
}

std::string exchange_bench_text(const ExchangeBench& bench) {
  std::string text = concat(
      "exchange   ", bench.what,
      "\n           GB/s: bytes that leave the rank that sends the most; shares are of the plain "
      "all-to-all\n");
  char line[200];
  std::snprintf(line, sizeof line, "%8s  %-10s %6s %10s %12s %7s %6s %12s %7s %6s %14s %7s\n", "MB",
                "routing", "chunks", "plan us", "dispatch us", "GB/s", "", "combine us", "GB/s", "",
                "all-to-all us", "GB/s");
  text += line;
  for (const ExchangeBench::Row& row : bench.rows) {
    const auto rate = [&](double seconds) { return row.bytes / seconds * 1e-9; };
    std::snprintf(line, sizeof line,
                  "%8.2f  %-10s %6lld %10.1f %12.1f %7.2f %4.0f %% %12.1f %7.2f %4.0f %% %14.1f "
                  "%7.2f\n",
                  row.bytes * 1e-6, row.routing, static_cast<long long>(row.chunks), row.plan * 1e6,
                  row.dispatch * 1e6, rate(row.dispatch), 100 * row.plain / row.dispatch,
                  row.combine * 1e6, rate(row.combine), 100 * row.plain / row.combine,
                  row.plain * 1e6, rate(row.plain));
    text += line;
  }
  return text;
}

}  // namespace moemamba
