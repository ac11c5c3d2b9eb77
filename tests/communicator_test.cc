#include <gtest/gtest.h>

#include "tests/support/communicator_suite.h"
#include "tests/support/in_world.h"

namespace moemamba {
namespace {

struct Setting {
  int ranks;
  bool worker;  // on a worker stream, else at once
};

class ThreadCommunicator : public testing::TestWithParam<Setting> {};

TEST_P(ThreadCommunicator, KeepsThePromises) {
  for (const CommunicatorCase& c : communicator_cases()) {
    SCOPED_TRACE(c.name);
    auto seats = make_thread_group(GetParam().ranks, c.name, c.deadline);
    EXPECT_NO_THROW(in_threads(GetParam().ranks, [&](int rank) {
      Stream stream = GetParam().worker ? Stream::worker() : Stream::immediate();
      try {
        c.run(*seats[size_t(rank)], stream);
      } catch (const std::exception& error) {
        ADD_FAILURE() << c.name << ", rank " << rank << ": " << error.what();
        seats[size_t(rank)]->abort(error.what());
      }
    }));
  }
}

INSTANTIATE_TEST_SUITE_P(Ranks, ThreadCommunicator,
                         testing::Values(Setting{1, false}, Setting{2, false}, Setting{3, false},
                                         Setting{5, false}, Setting{8, false}, Setting{1, true},
                                         Setting{3, true}, Setting{8, true}),
                         [](const auto& info) {
                           return std::to_string(info.param.ranks) +
                                  (info.param.worker ? "_worker" : "_immediate");
                         });

TEST(ThreadGroup, CallsMembersByTheirWorldRank) {
  auto seats = make_thread_group(2, "pair", std::chrono::milliseconds(50), {3, 7});
  Stream stream = Stream::immediate();
  try {
    barrier(*seats[0], stream);
    FAIL() << "expected the loss of rank 7";
  } catch (const PeerLost& error) {
    EXPECT_EQ(error.rank(), 7);
    EXPECT_STREQ(error.what(), "group pair: rank 7: nothing heard for 50 ms from rank 7");
  }
}

TEST(AllReduce, RefusesASmallWorkspace) {
  auto seats = make_thread_group(2, "pair", std::chrono::milliseconds(50));
  Stream stream = Stream::immediate();
  float values[4] = {}, workspace[7] = {};
  EXPECT_THROW(all_reduce_sum(*seats[0], stream, view(values, {4}), view(workspace, {7})), Error);
}

}  // namespace
}  // namespace moemamba
