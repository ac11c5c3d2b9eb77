#include "launcher/rank.h"

#include "core/schema.h"
#include "launcher/build_facts.h"
#include "launcher/launch.h"
#include "launcher/machine.h"
#include "model/config.h"

namespace moemamba {

namespace {

Facts facts_of(const RunConfig& config) {
  Facts facts;
  for (const auto& [name, value] : build_facts()) facts.emplace_back("build " + name, value);
  for (auto& [setting, value] : resolved_values(config)) facts.emplace_back(setting, value);
  return facts;
}

}  // namespace

void run_rank(const RunConfig& config, FunctionRef<void(Rank&)> work) {
  const std::chrono::milliseconds deadline(
      int64_t(std::max(1.0, config.parallel().deadline_seconds() * 1e3)));
  World world;
  check(world.size() == started_ranks(), started_ranks(), " ranks were started, but MPI knows of ",
        world.size(), "; start them with this Open MPI's mpirun, or with srun --mpi=pmix");
  world.agree(facts_of(config), deadline);
  const RankLayout layout(world.size(), config.parallel().expert(),
                          has_routers(config.model()) ? config.model().experts() : 0);
  ProcessGroups groups = world.make_groups(layout, deadline);
  const int threads =
      config.train().threads() > 0 ? config.train().threads() : threads_per_rank(world.node_size());
  Rank rank{world, groups, threads};
  try {
    work(rank);
  } catch (const std::exception& error) {
    groups.abort(error.what());
    throw;  // to main, which prints it and chooses the exit code
  }
}

}  // namespace moemamba
