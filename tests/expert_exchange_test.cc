#include "parallel/expert_exchange.h"

#include <gtest/gtest.h>

#include <map>

#include "core/random.h"
#include "tests/support/cases.h"
#include "tests/support/in_world.h"

namespace moemamba {
namespace {

// How many rows `rank` sends to `expert`.
using Routing = std::function<int(int rank, int expert)>;

struct Scene {
  int ranks, experts;
  int64_t capacity, width;
  Routing rows;

  int64_t sends(int rank) const {
    int64_t sum = 0;
    for (int e = 0; e < experts; ++e) sum += rows(rank, e);
    return sum;
  }
  int64_t most() const {
    int64_t most = 0;
    for (int r = 0; r < ranks; ++r) most = std::max(most, sends(r));
    return most;
  }
};

// What column d of the j-th row of `rank` for `expert` holds.
float cell(int rank, int expert, int64_t j, int64_t d) {
  return float(rank * 1000000 + expert * 10000 + j) + float(d) * 0.001f;
}

// (expert, rank, j) in the order in which `coordinate` must see its rows.
std::vector<std::array<int64_t, 3>> expected_rows(const Scene& w, const RankLayout& layout,
                                                  int coordinate) {
  std::vector<std::array<int64_t, 3>> rows;
  for (int e = layout.first_expert(coordinate); e < layout.first_expert(coordinate + 1); ++e)
    for (int r = 0; r < w.ranks; ++r)
      for (int j = 0; j < w.rows(r, e); ++j) rows.push_back({e, r, j});
  return rows;
}

void fill_rows(const Scene& w, int rank, const Tensor& rows, const Tensor& offsets) {
  int64_t at = 0;
  for (int e = 0; e < w.experts; ++e) {
    offsets.as<int32_t>()[e] = int32_t(at);
    for (int j = 0; j < w.rows(rank, e); ++j, ++at)
      for (int64_t d = 0; d < w.width; ++d) rows.row<float>(at)[d] = cell(rank, e, j, d);
  }
  offsets.as<int32_t>()[w.experts] = int32_t(at);
}

void expect_chunk(const Scene& w, const RankLayout& layout, int me, int64_t chunk,
                  const Rows& found) {
  const auto expected = expected_rows(w, layout, me);
  const int64_t begin = std::min<int64_t>(chunk * w.capacity, int64_t(expected.size()));
  const int64_t end = std::min<int64_t>(begin + w.capacity, int64_t(expected.size()));
  const int32_t* offsets = found.offsets.as<int32_t>();
  ASSERT_EQ(offsets[0], 0);
  ASSERT_EQ(offsets[layout.experts_of(me)], end - begin);
  std::map<int64_t, int64_t> counts;
  for (int64_t i = begin; i < end; ++i) {
    const auto [e, r, j] = expected[size_t(i)];
    ++counts[e];
    for (int64_t d = 0; d < w.width; ++d)
      ASSERT_EQ(found.values.row<float>(i - begin)[d], cell(int(r), int(e), j, d))
          << "chunk " << chunk << ", row " << i - begin << ", column " << d;
  }
  for (int e = 0; e < layout.experts_of(me); ++e)
    ASSERT_EQ(offsets[e + 1] - offsets[e], counts[layout.first_expert(me) + e]) << "expert " << e;
}

// Every rank's rows reach their experts in order, and come back to where they were.
void there_and_back(const Scene& w, ProcessGroups& groups, Stream& stream) {
  const int me = groups.expert->rank();
  Case c(1);
  const int64_t S = w.most(), C = w.capacity;
  Tensor rows = c.empty({S, w.width}), back = c.zeros({S, w.width});
  Tensor offsets = c.empty({w.experts + 1}, DType::i32);
  Tensor staging = c.empty({C, w.width});
  fill_rows(w, me, rows, offsets);
  ExpertExchange exchange(*groups.expert, groups.layout, C, S);
  for (int round = 0; round < 2; ++round) {
    exchange.plan(stream, offsets);
    ASSERT_EQ(exchange.received_rows(), int64_t(expected_rows(w, groups.layout, me).size()));
    ASSERT_LE(exchange.chunks(), exchange.most_chunks());
    for (int64_t i = 0; i < exchange.chunks(); ++i) {
      Rows out{c.empty({C, w.width}), c.empty({groups.layout.experts_of(me) + 1}, DType::i32)};
      exchange.dispatch(stream, i, rows, out, staging);
      stream.synchronize();
      expect_chunk(w, groups.layout, me, i, out);
      exchange.combine(stream, i, out, back, staging);
      stream.synchronize();
    }
  }
  for (int64_t r = 0; r < S; ++r)
    for (int64_t d = 0; d < w.width; ++d)
      ASSERT_EQ(back.row<float>(r)[d], r < w.sends(me) ? rows.row<float>(r)[d] : 0.0f);
  EXPECT_GT(exchange.take_seconds(), 0);
}

void expect_there_and_back(const Scene& w) {
  SCOPED_TRACE(testing::Message() << w.ranks << " ranks, " << w.experts << " experts, capacity "
                                  << w.capacity);
  in_world(RankLayout(w.ranks, w.ranks, w.experts), [&](ProcessGroups& groups) {
    Stream at_once = Stream::immediate(), worker = Stream::worker();
    there_and_back(w, groups, at_once);
    there_and_back(w, groups, worker);
  });
}

TEST(ExpertExchange, BringsRowsThereAndBack) {
  const Routing random = [](int rank, int expert) {
    return int(Random(1, "rows").integer(uint64_t(rank * 100 + expert), 9));
  };
  for (int ranks : {1, 2, 3, 5})
    for (int64_t capacity : {1, 7, 64, 1000})
      for (int64_t width : {1, 5, 32})
        expect_there_and_back({ranks, 7, capacity, width, random});
}

TEST(ExpertExchange, SharesFortyTwoExpertsOutOverFourRanks) {
  expect_there_and_back({4, 42, 100, 8, [](int rank, int expert) { return (rank + expert) % 4; }});
}

TEST(ExpertExchange, CutsWhatGoesToOneExpertIntoChunks) {
  const Scene w{4, 8, 10, 6, [](int, int expert) { return expert == 5 ? 33 : 0; }};
  expect_there_and_back(w);
  in_world(RankLayout(4, 4, 8), [&](ProcessGroups& groups) {
    Case c(1);
    Tensor rows = c.empty({33, 6}), offsets = c.empty({9}, DType::i32);
    fill_rows(w, groups.rank, rows, offsets);
    ExpertExchange exchange(*groups.expert, groups.layout, 10, 33);
    Stream stream = Stream::immediate();
    exchange.plan(stream, offsets);
    EXPECT_EQ(exchange.chunks(), 14);  // ceil(4 * 33 / 10), also on ranks that receive nothing
    EXPECT_EQ(exchange.most_chunks(), 14);
    EXPECT_EQ(exchange.received_rows(), groups.rank == 2 ? 132 : 0);
  });
}

TEST(ExpertExchange, TakesRanksWithoutRowsAndStepsWithoutAny) {
  expect_there_and_back({3, 3, 4, 3, [](int rank, int expert) { return rank == 1 ? expert : 0; }});
  expect_there_and_back({3, 3, 4, 3, [](int, int) { return 0; }});
  expect_there_and_back({2, 2, 4, 3, [](int rank, int) { return rank == 0 ? 1 : 0; }});
}

TEST(ExpertExchange, AssumesFullChunksOnADryStream) {
  auto seats = make_thread_group(4, "expert", std::chrono::milliseconds(50));
  const RankLayout layout(4, 4, 8);
  Stream dry = Stream::dry();
  Case c(1);
  Tensor rows = c.zeros({20, 4}), staging = c.zeros({16, 4});
  Rows out{c.zeros({16, 4}), c.zeros({3}, DType::i32)};
  ExpertExchange exchange(*seats[2], layout, 16, 20);
  exchange.plan(dry, c.zeros({9}, DType::i32));
  EXPECT_EQ(exchange.chunks(), 2);
  EXPECT_EQ(exchange.received_rows(), 32);
  exchange.dispatch(dry, 1, rows, out, staging);
  exchange.combine(dry, 1, out, rows, staging);
  ExpertExchange roomy(*seats[2], layout, 100, 20);
  roomy.plan(dry, c.zeros({9}, DType::i32));
  EXPECT_EQ(roomy.chunks(), 1);
}

TEST(ExpertExchange, RefusesMoreRowsThanItWasMadeForAndOffsetsThatFall) {
  auto seats = make_thread_group(1, "expert", std::chrono::milliseconds(50));
  const RankLayout layout(1, 1, 2);
  Stream stream = Stream::immediate();
  Case c(1);
  ExpertExchange exchange(*seats[0], layout, 4, 5);
  EXPECT_THROW(exchange.plan(stream, c.values({3}, {0, 4, 6}, DType::i32)), Error);
  EXPECT_THROW(exchange.plan(stream, c.values({3}, {0, 4, 2}, DType::i32)), Error);
  EXPECT_THROW(exchange.plan(stream, c.values({3}, {1, 2, 3}, DType::i32)), Error);
  exchange.plan(stream, c.values({3}, {0, 4, 5}, DType::i32));
  EXPECT_EQ(exchange.chunks(), 2);
  Rows out{c.empty({4, 3}), c.empty({3}, DType::i32)};
  EXPECT_THROW(exchange.dispatch(stream, 2, c.empty({5, 3}), out, c.empty({4, 3})), Error);
  EXPECT_THROW(ExpertExchange(*seats[0], layout, 0, 5), Error);
}

}  // namespace
}  // namespace moemamba
