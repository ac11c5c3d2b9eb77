#include "parallel/expert_exchange.h"

#include <gtest/gtest.h>

#include "core/gpu.h"
#include "core/random.h"
#include "tests/support/exchange_scene.h"
#include "tests/support/harness.h"
#include "tests/support/in_world.h"

namespace moemamba {
namespace {

using Routing = std::function<int(int rank, int expert)>;

void expect_there_and_back(const ExchangeScene& w) {
  SCOPED_TRACE(testing::Message() << w.ranks << " ranks, " << w.experts << " experts, capacity "
                                  << w.capacity);
  in_world(RankLayout(w.ranks, w.ranks, w.experts), [&](ProcessGroups& groups) {
    Stream at_once = Stream::immediate(), worker = Stream::worker();
    there_and_back(w, groups, at_once);
    there_and_back(w, groups, worker);
  });
}

// The ranks are threads that share one GPU. NCCL's turn is communicator_nccl_mpi_test.
void expect_there_and_back_on_a_gpu(const ExchangeScene& w) {
  SCOPED_TRACE(testing::Message() << "on a GPU: " << w.ranks << " ranks, " << w.experts
                                  << " experts, capacity " << w.capacity);
  if (gpu::devices().empty()) return;
  in_world(RankLayout(w.ranks, w.ranks, w.experts), [&](ProcessGroups& groups) {
    Stream stream = Stream::cuda();
    there_and_back(w, groups, stream);
  });
  count_comparison();
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

TEST(ExpertExchange, DoesSoOnAGpu) {
  const Routing random = [](int rank, int expert) {
    return int(Random(1, "rows").integer(uint64_t(rank * 100 + expert), 9));
  };
  for (int ranks : {1, 2, 3})
    for (int64_t capacity : {7, 64, 1000})
      for (int64_t width : {1, 5, 32})
        expect_there_and_back_on_a_gpu({ranks, 7, capacity, width, random});
  const Routing even = [](int rank, int expert) { return (rank + expert) % 4; };
  expect_there_and_back_on_a_gpu({4, 42, 100, 8, even});
  expect_there_and_back_on_a_gpu({1, 1000, 5000, 6, even});
  expect_there_and_back_on_a_gpu({1, 1000, 500, 6, even});  // more integers than one launch takes
  expect_there_and_back_on_a_gpu({2, 1000, 5000, 6, even});  // and more segments
  expect_there_and_back_on_a_gpu({3, 3, 4, 3, [](int, int) { return 0; }});
  expect_there_and_back_on_a_gpu({2, 8, 10, 6, [](int, int e) { return e == 5 ? 33 : 0; }});
}

TEST(ExpertExchange, CutsWhatGoesToOneExpertIntoChunks) {
  const ExchangeScene w{4, 8, 10, 6, [](int, int expert) { return expert == 5 ? 33 : 0; }};
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
