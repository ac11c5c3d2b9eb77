#include "parallel/layout.h"

#include <algorithm>
#include <string>

#include "core/error.h"

namespace moemamba {

namespace {

// "1, 2, 4 or 8"
std::string divisors(int number) {
  std::vector<int> all;
  for (int i = 1; i <= number; ++i)
    if (number % i == 0) all.push_back(i);
  std::string text;
  for (size_t i = 0; i < all.size(); ++i)
    text += (i == 0 ? "" : i + 1 == all.size() ? " or " : ", ") + std::to_string(all[i]);
  return text;
}

}  // namespace

RankLayout::RankLayout(int ranks, int expert, int experts)
    : ranks_(ranks), expert_(expert), experts_(experts) {
  check(ranks >= 1, "a world has at least 1 rank, found ", ranks);
  check(experts >= 0, "model.experts is at least 0, found ", experts);
  check(expert >= 1 && ranks % expert == 0, "parallel.expert = ", expert, ": must divide the ",
        ranks, " ranks that were started; try ", divisors(ranks));
  check(experts == 0 || expert <= experts, "parallel.expert = ", expert, ": there are only ",
        experts, " experts to hold; take at most ", experts, " ranks for them");
}

std::vector<int> RankLayout::expert_group(int rank) const {
  std::vector<int> members;
  for (int i = 0; i < expert_; ++i) members.push_back(expert_data_coordinate(rank) * expert_ + i);
  return members;
}

std::vector<int> RankLayout::expert_data_group(int rank) const {
  std::vector<int> members;
  for (int i = expert_coordinate(rank); i < ranks_; i += expert_) members.push_back(i);
  return members;
}

// The first `experts % expert` coordinates hold one expert more than the others.
int RankLayout::first_expert(int coordinate) const {
  return coordinate * (experts_ / expert_) + std::min(coordinate, experts_ % expert_);
}

int RankLayout::coordinate_of_expert(int expert) const {
  check(expert >= 0 && expert < experts_, "expert ", expert, " of ", experts_);
  const int each = experts_ / expert_, longer = experts_ % expert_;
  const int in_longer = longer * (each + 1);
  return expert < in_longer ? expert / (each + 1) : longer + (expert - in_longer) / each;
}

}  // namespace moemamba
