// The ranks of mpirun: started by mpi_ranks_test and hosts_test. Exit code 0 when every rank kept
// every promise.
#include <cstdio>

#include "tests/support/communicator_suite.h"
#include "tests/support/mpi_world.h"

namespace moemamba {
namespace {

using std::chrono::seconds;

int64_t run_case(World& world, const CommunicatorCase& c, bool worker) {
  int64_t failed = 0;
  {
    ProcessGroups groups = world.make_groups(RankLayout(world.size(), 1, 0), c.deadline);
    try {
      Stream stream = worker ? Stream::worker() : Stream::immediate();
      c.run(*groups.data, stream);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s, rank %d of %d: %s\n", c.name.c_str(), world.rank(), world.size(),
                   error.what());
      groups.abort(error.what());
      failed = 1;
    }
    agree_on_failures(world, 0);  // nobody leaves a group while others still use it
  }
  return agree_on_failures(world, failed);
}

// Every second rank holds another value of one fact, and rank 0 a fact of its own.
void refuse_different_facts(World& world) {
  Facts facts = {{"build", "abc"}, {"model.experts", "42"}};
  world.agree(facts, seconds(60));
  if (world.size() == 1) return;
  facts[1].second = world.rank() % 2 ? "43" : "42";
  if (world.rank() == 0) facts.emplace_back("seed", "7");
  try {
    world.agree(facts, seconds(60));
  } catch (const Error& error) {
    const std::string text = error.what();
    for (const char* part : {"model.experts:", "\"42\"", "\"43\"", "seed:", "rank 0 \"7\""})
      check(text.find(part) != std::string::npos, "expected ", part, " in: ", text);
    check(text.find("build:") == std::string::npos, "build does not differ: ", text);
    return;
  }
  check(false, "different facts were not noticed");
}

// Groups of both axes at work at the same time, on two threads.
void use_groups_at_once(World& world) {
  for (int expert = 1; expert <= world.size(); ++expert) {
    if (world.size() % expert) continue;
    const RankLayout layout(world.size(), expert, 64);
    ProcessGroups groups = world.make_groups(layout, seconds(60));
    check(groups.ranks_of_machine == world.node_size(), "ranks that share this machine");
    Stream communication = Stream::worker(), compute = Stream::immediate();
    std::vector<int64_t> dense(5000, 1), local(5000, 1);
    std::vector<int64_t> space(5000 * size_t(world.size())), other(space.size());
    for (int i = 0; i < 3; ++i) {
      all_reduce_sum(*groups.data, communication, view(dense.data(), {5000}),
                     view(space.data(), {int64_t(space.size())}));
      all_reduce_sum(*groups.expert, compute, view(local.data(), {5000}),
                     view(other.data(), {int64_t(other.size())}));
    }
    communication.synchronize();
    const int64_t all = world.size();
    check(dense[4999] == all * all * all, "the sum over all ranks is ", dense[4999]);
    check(local[4999] == int64_t(expert) * expert * expert, "the sum over the expert group is ",
          local[4999]);
  }
}

// Where there are none, every rank says so, and says it after all have heard what the others see.
void find_no_gpus(World& world) {
  if (!gpu::devices().empty()) return;
  std::string message;
  try {
    world.choose_gpu("0", seconds(60));
  } catch (const Error& error) {
    message = error.what();
  }
  check(message.starts_with("no GPU: ") && message.find("use --device=cpu") != message.npos,
        "a GPU where there is none: ", message);
}

int run() {
  World world;
  try {
    check(world.node_size() >= 1 && world.node_rank() < world.node_size(), "node-local ranks");
    refuse_different_facts(world);
    find_no_gpus(world);
    use_groups_at_once(world);
    for (bool worker : {false, true}) {
      for (const CommunicatorCase& c : communicator_cases()) {
        const int64_t failed = run_case(world, c, worker);
        if (failed == 0) continue;
        if (world.rank() == 0)
          std::fprintf(stderr, "%s: %d ranks failed\n", c.name.c_str(), int(failed));
        world.abort(3);
      }
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "rank %d of %d: %s\n", world.rank(), world.size(), error.what());
    world.abort(3);
  }
  std::printf("rank %d of %d on %s (%d of %d there): all promises kept\n", world.rank(),
              world.size(), world.hostname().c_str(), world.node_rank(), world.node_size());
  return 0;
}

}  // namespace
}  // namespace moemamba

int main() { return moemamba::run(); }
