#include "core/error.h"
#include "parallel/groups.h"

namespace moemamba {

namespace {

// A seat in a group that is only planned: it knows its place and cannot talk.
class PlannedCommunicator : public Communicator {
 public:
  PlannedCommunicator(int rank, int size, std::string name)
      : rank_(rank), size_(size), name_(std::move(name)) {}
  int rank() const override { return rank_; }
  int size() const override { return size_; }
  const std::string& name() const override { return name_; }
  void all_to_all(Stream&, const AllToAll&) override { refuse(); }
  void all_gather(Stream&, const void*, void*, int64_t) override { refuse(); }
  void abort(const std::string&) noexcept override {}

 private:
  [[noreturn]] void refuse() const {
    throw Error(concat("group ", name_, " is only planned: no rank is there to talk to"));
  }
  int rank_, size_;
  std::string name_;
};

}  // namespace

ProcessGroups make_planned_groups(const RankLayout& layout, int rank) {
  const auto seat = [](int at, int size, const char* name) {
    return std::make_unique<PlannedCommunicator>(at, size, name);
  };
  ProcessGroups groups{.layout = layout, .rank = rank};
  groups.data = seat(rank, layout.ranks(), "data");
  groups.control = seat(rank, layout.ranks(), "control");
  groups.checkpoint = seat(rank, layout.ranks(), "checkpoint");
  groups.expert = seat(layout.expert_coordinate(rank), layout.expert_size(), "expert");
  groups.expert_data =
      seat(layout.expert_data_coordinate(rank), layout.expert_data_size(), "expert_data");
  return groups;
}

}  // namespace moemamba
