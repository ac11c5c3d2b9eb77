#include "tests/support/exchange_scene.h"

#include <map>

namespace moemamba {

namespace {

// What column d of the j-th row of `rank` for `expert` holds.
float cell(int64_t rank, int64_t expert, int64_t j, int64_t d) {
  return float(rank * 1000000 + expert * 10000 + j) + float(d) * 0.001f;
}

// (expert, rank, j) in the order in which `coordinate` must see its rows.
std::vector<std::array<int64_t, 3>> expected_rows(const ExchangeScene& w, const RankLayout& layout,
                                                  int coordinate) {
  std::vector<std::array<int64_t, 3>> rows;
  for (int e = layout.first_expert(coordinate); e < layout.first_expert(coordinate + 1); ++e)
    for (int r = 0; r < w.ranks; ++r)
      for (int j = 0; j < w.rows(r, e); ++j) rows.push_back({e, r, j});
  return rows;
}

// A copy on the host, owned by `keeper`.
Tensor fetch(Stream& stream, const Tensor& tensor, Case& keeper) {
  const Tensor host = keeper.empty(tensor.shape, tensor.dtype);
  copy(stream, tensor, host);
  stream.synchronize();
  return host;
}

void check_chunk(const ExchangeScene& w, const RankLayout& layout, int me, int64_t chunk,
                 const Rows& found) {
  const auto expected = expected_rows(w, layout, me);
  const int64_t begin = std::min<int64_t>(chunk * w.capacity, int64_t(expected.size()));
  const int64_t end = std::min<int64_t>(begin + w.capacity, int64_t(expected.size()));
  const int32_t* offsets = found.offsets.as<int32_t>();
  const int local = layout.experts_of(me);
  check(offsets[0] == 0 && offsets[local] == end - begin, "chunk ", chunk, ": offsets end at ",
        offsets[local], ", expected ", end - begin);
  std::map<int64_t, int64_t> counts;
  for (int64_t i = begin; i < end; ++i) {
    const auto [e, r, j] = expected[size_t(i)];
    ++counts[e];
    for (int64_t d = 0; d < w.width; ++d) {
      const float cell_found = found.values.row<float>(i - begin)[d];
      check(cell_found == cell(r, e, j, d), "chunk ", chunk, ", row ", i - begin, ", column ", d,
            ": found ", cell_found, ", expected ", cell(r, e, j, d));
    }
  }
  for (int e = 0; e < local; ++e)
    check(offsets[e + 1] - offsets[e] == counts[layout.first_expert(me) + e], "chunk ", chunk,
          ", expert ", e, ": found ", offsets[e + 1] - offsets[e], " rows");
}

// What one rank's exchange moves, where its stream works.
struct Tensors {
  Tensors(const ExchangeScene& w, int local, Stream& stream)
      : S(w.most()),
        arena("scene", stream.device(),
              (2 * S + 2 * w.capacity + 4) * (w.width * 4 + 16) + (2 * w.experts + 64) * 16),
        rows(arena.take({S, w.width})),
        back(arena.take({S, w.width})),
        staging(arena.take({w.capacity, w.width})),
        offsets(arena.take({w.experts + 1}, DType::i32)),
        no_offsets(arena.take({w.experts + 1}, DType::i32)),
        out{arena.take({w.capacity, w.width}), arena.take({local + 1}, DType::i32)} {}
  int64_t S;
  Arena arena;
  Tensor rows, back, staging, offsets, no_offsets;
  Rows out;
};

void check_returned(const ExchangeScene& w, int me, const Tensor& rows, const Tensor& back) {
  for (int64_t r = 0; r < rows.rows(); ++r)
    for (int64_t d = 0; d < w.width; ++d) {
      const float expected = r < w.sends(me) ? rows.row<float>(r)[d] : 0.f;
      check(back.row<float>(r)[d] == expected, "row ", r, " came back as ", back.row<float>(r)[d],
            " in column ", d, ", expected ", expected);
    }
}

}  // namespace

void fill_rows(const ExchangeScene& w, int rank, const Tensor& rows, const Tensor& offsets) {
  int64_t at = 0;
  for (int e = 0; e < w.experts; ++e) {
    offsets.as<int32_t>()[e] = int32_t(at);
    for (int j = 0; j < w.rows(rank, e); ++j, ++at)
      for (int64_t d = 0; d < w.width; ++d) rows.row<float>(at)[d] = cell(rank, e, j, d);
  }
  offsets.as<int32_t>()[w.experts] = int32_t(at);
}

void there_and_back(const ExchangeScene& w, ProcessGroups& groups, Stream& stream) {
  const int me = groups.expert->rank();
  Case c(1);
  Tensors t(w, groups.layout.experts_of(me), stream);
  const Tensor rows = c.zeros({t.S, w.width}), offsets = c.empty({w.experts + 1}, DType::i32);
  fill_rows(w, me, rows, offsets);
  copy(stream, rows, t.rows);
  copy(stream, offsets, t.offsets);
  fill_zero(stream, t.back);
  fill_zero(stream, t.no_offsets);
  stream.synchronize();
  ExpertExchange exchange(*groups.expert, groups.layout, w.capacity, t.S, stream.device());
  ExpertExchange::Plan kept;
  const auto expected = int64_t(expected_rows(w, groups.layout, me).size());
  const bool unasked = stream.device() == DeviceKind::cuda && w.ranks == 1 && w.capacity >= t.S;
  for (int round = 0; round < 2; ++round) {
    exchange.plan(stream, round == 0 ? t.offsets : t.no_offsets);
    if (round == 0)
      exchange.keep(kept);
    else
      exchange.use(kept);
    check(unasked || exchange.received_rows() == expected, "found ", exchange.received_rows(),
          " rows, expected ", expected);
    check(exchange.chunks() <= exchange.most_chunks(), "found ", exchange.chunks(), " chunks");
    for (int64_t i = 0; i < exchange.chunks(); ++i) {
      exchange.dispatch(stream, i, t.rows, t.out, t.staging);
      check_chunk(w, groups.layout, me, i,
                  {fetch(stream, t.out.values, c), fetch(stream, t.out.offsets, c)});
      exchange.combine(stream, i, t.out, t.back, t.staging);
    }
    check_returned(w, me, rows, fetch(stream, t.back, c));
    fill_zero(stream, t.back);
  }
  stream.synchronize();
  check((exchange.take_seconds() > 0) == (stream.device() == DeviceKind::cpu), "the clock");
}

}  // namespace moemamba
