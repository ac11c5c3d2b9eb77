#pragma once
#include <cstdint>
#include <vector>

namespace moemamba {

// Where a rank stands. Two axes over the same ranks (house.md, decision 1): `data` = all ranks;
// `expert` neighbouring ranks together hold every expert once; `expert_data` = data / expert
// replicas of each expert shard. Pure arithmetic.
class RankLayout {
 public:
  // Throws unless 1 <= expert, expert divides ranks, and expert <= experts; 0 experts = a dense
  // model, for which any expert that divides ranks will do.
  RankLayout(int ranks, int expert, int experts);
  int ranks() const { return ranks_; }
  int expert_size() const { return expert_; }
  int expert_data_size() const { return ranks_ / expert_; }
  int expert_coordinate(int rank) const { return rank % expert_; }
  int expert_data_coordinate(int rank) const { return rank / expert_; }
  std::vector<int> expert_group(int rank) const;       // world ranks, ascending
  std::vector<int> expert_data_group(int rank) const;  // world ranks, ascending
  int experts() const { return experts_; }
  // The experts of coordinate c are first_expert(c) .. first_expert(c + 1) - 1; 42 over 4: 11, 11,
  // 10, 10.
  int first_expert(int coordinate) const;
  int experts_of(int coordinate) const {
    return first_expert(coordinate + 1) - first_expert(coordinate);
  }
  int coordinate_of_expert(int expert) const;

 private:
  int ranks_, expert_, experts_;
};

}  // namespace moemamba
