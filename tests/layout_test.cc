#include "parallel/layout.h"

#include <gtest/gtest.h>

#include <numeric>

#include "core/error.h"
#include "parallel/groups.h"

namespace moemamba {
namespace {

std::string message_of(int ranks, int expert, int experts) {
  try {
    RankLayout(ranks, expert, experts);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(RankLayout, SharesExpertsOutUnevenly) {
  const RankLayout layout(4, 4, 42);
  std::vector<int> shares;
  for (int c = 0; c < 4; ++c) shares.push_back(layout.experts_of(c));
  EXPECT_EQ(shares, (std::vector<int>{11, 11, 10, 10}));
  EXPECT_EQ(layout.first_expert(4), 42);
}

TEST(RankLayout, FindsTheOwnerOfEveryExpert) {
  for (auto [expert, experts] : {std::pair{1, 1}, {1, 42}, {4, 42}, {8, 8}, {5, 9}, {7, 48}}) {
    const RankLayout layout(expert * 3, expert, experts);
    for (int e = 0; e < experts; ++e) {
      const int c = layout.coordinate_of_expert(e);
      EXPECT_LE(layout.first_expert(c), e);
      EXPECT_LT(e, layout.first_expert(c + 1));
    }
    EXPECT_THROW(layout.coordinate_of_expert(experts), Error);
  }
}

TEST(RankLayout, CutsTenThousandRanksIntoGroups) {
  const RankLayout layout(10000, 16, 128);
  EXPECT_EQ(layout.expert_data_size(), 625);
  std::vector<int> seen(10000);
  for (int r = 0; r < 10000; ++r) {
    const auto expert = layout.expert_group(r), data = layout.expert_data_group(r);
    ASSERT_EQ(expert.size(), 16u);
    ASSERT_EQ(data.size(), 625u);
    ASSERT_EQ(expert[size_t(layout.expert_coordinate(r))], r);
    ASSERT_EQ(data[size_t(layout.expert_data_coordinate(r))], r);
    ASSERT_EQ(expert.back() - expert.front(), 15);  // neighbours
    if (layout.expert_coordinate(r) == 0)
      for (int member : expert) ++seen[size_t(member)];
  }
  EXPECT_EQ(std::accumulate(seen.begin(), seen.end(), 0), 10000);
  EXPECT_EQ(*std::min_element(seen.begin(), seen.end()), 1);
}

TEST(RankLayout, SaysWhatToChange) {
  EXPECT_NE(message_of(8, 3, 42).find("parallel.expert = 3: must divide the 8 ranks that were "
                                      "started; try 1, 2, 4 or 8"),
            std::string::npos);
  EXPECT_NE(message_of(1, 2, 42).find("try 1"), std::string::npos);
  EXPECT_NE(message_of(8, 8, 6).find("there are only 6 experts"), std::string::npos);
  EXPECT_NE(message_of(0, 1, 6), "");
  EXPECT_NE(message_of(4, 0, 6), "");
  EXPECT_EQ(message_of(4, 2, 0), "");  // a dense model
}

TEST(ThreadGroups, SeatEveryRankInItsGroups) {
  const RankLayout layout(6, 2, 4);
  const auto groups = make_thread_groups(layout, std::chrono::seconds(1));
  ASSERT_EQ(groups.size(), 6u);
  for (int r = 0; r < 6; ++r) {
    const ProcessGroups& g = groups[size_t(r)];
    EXPECT_EQ(g.rank, r);
    EXPECT_EQ(g.data->rank(), r);
    EXPECT_EQ(g.control->size(), 6);
    EXPECT_EQ(g.checkpoint->size(), 6);
    EXPECT_EQ(g.checkpoint->rank(), r);
    EXPECT_EQ(g.expert->size(), 2);
    EXPECT_EQ(g.expert->rank(), r % 2);
    EXPECT_EQ(g.expert_data->size(), 3);
    EXPECT_EQ(g.expert_data->rank(), r / 2);
    EXPECT_EQ(g.expert_data->name(), "expert_data");
  }
}

}  // namespace
}  // namespace moemamba
