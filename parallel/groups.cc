#include "parallel/groups.h"

#include <numeric>

namespace moemamba {

// The training thread waits for rows and facts; gradients, weights and votes travel beside it, and
// where it waits for these, GradientBuckets says so.
void ProcessGroups::tell(Activity* to) {
  activity = to;
  for (Communicator* group : {expert.get(), control.get()}) group->tell(to, true);
  for (Communicator* group : {data.get(), expert_data.get(), checkpoint.get()})
    group->tell(to, false);
}

void ProcessGroups::poll() {
  try {
    for (Communicator* group : {control.get(), data.get(), expert_data.get(), expert.get()})
      if (group) group->poll();
  } catch (const std::exception& error) {
    abort(error.what());
    throw;
  }
}

// The small groups first: nothing of a GPU can keep them from telling.
void ProcessGroups::abort(const std::string& why) noexcept {
  for (Communicator* group :
       {control.get(), checkpoint.get(), data.get(), expert_data.get(), expert.get()})
    if (group) group->abort(why);
}

std::vector<ProcessGroups> make_thread_groups(const RankLayout& layout,
                                              std::chrono::milliseconds deadline) {
  std::vector<ProcessGroups> groups;
  for (int r = 0; r < layout.ranks(); ++r)
    groups.push_back(
        ProcessGroups{.layout = layout, .rank = r, .ranks_of_machine = layout.ranks()});

  // Seats the members of one group; the same call for each group of the layout.
  const auto seat = [&](std::unique_ptr<Communicator> ProcessGroups::*field, const char* name,
                        const std::vector<int>& members) {
    auto seats = make_thread_group(int(members.size()), name, deadline, members);
    for (size_t i = 0; i < members.size(); ++i)
      groups[size_t(members[i])].*field = std::move(seats[i]);
  };
  std::vector<int> all(static_cast<size_t>(layout.ranks()));
  std::iota(all.begin(), all.end(), 0);
  seat(&ProcessGroups::data, "data", all);
  seat(&ProcessGroups::control, "control", all);
  seat(&ProcessGroups::checkpoint, "checkpoint", all);
  for (int r = 0; r < layout.ranks(); r += layout.expert_size())
    seat(&ProcessGroups::expert, "expert", layout.expert_group(r));
  for (int r = 0; r < layout.expert_size(); ++r)
    seat(&ProcessGroups::expert_data, "expert_data", layout.expert_data_group(r));
  return groups;
}

}  // namespace moemamba
