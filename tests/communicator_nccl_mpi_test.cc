// The ranks of mpirun on GPUs, one each: groups over NCCL, the exchange of rows and the gradient
// buckets on them. Exit code 0 when every rank kept every promise; where there are fewer GPUs than
// ranks, or one rank alone, it says so and does nothing.
#include <cstdio>
#include <thread>

#include "core/random.h"
#include "tests/support/bucket_scene.h"
#include "tests/support/communicator_suite.h"
#include "tests/support/exchange_scene.h"
#include "tests/support/mpi_world.h"

namespace moemamba {
namespace {

using std::chrono::seconds;

// NCCL does not compare the counts of both sides: the exchange agrees on them beforehand. And of
// more than two it is not known who is late.
bool applies(const CommunicatorCase& c, int ranks) {
  return c.name != "mismatch" && (c.name != "late" || ranks == 2);
}
// Some member is lost: the group is torn down by all.
bool loses(const CommunicatorCase& c) {
  return c.name == "abort_wakes" || c.name == "late";
}

int64_t run_case(World& world, const CommunicatorCase& c) {
  int64_t failed = 0;
  {
    ProcessGroups groups =
        world.make_groups(RankLayout(world.size(), 1, 0), c.deadline, DeviceKind::cuda);
    Stream stream = Stream::cuda();
    stream.watch([&groups] { groups.data->poll(); });
    try {
      c.run(*groups.data, stream);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s, rank %d of %d: %s\n", c.name.c_str(), world.rank(), world.size(),
                   error.what());
      groups.abort(error.what());
      failed = 1;
    }
    agree_on_failures(world, 0);  // nobody leaves a group while others still use it
    if (loses(c)) groups.abort("the case is over");
    agree_on_failures(world, 0);
  }
  return agree_on_failures(world, failed);
}

// Very uneven rows, no rows, several chunks, 42 experts, more segments than one launch takes.
std::vector<ExchangeScene> scenes(int ranks) {
  const auto random = [](int rank, int expert) {
    return int(Random(1, "rows").integer(uint64_t(rank * 100 + expert), 90));
  };
  const auto to_one = [](int, int expert) { return expert == 5 ? 330 : 0; };
  const auto from_one = [](int rank, int) { return rank == 0 ? 50 : 0; };
  const auto none = [](int, int) { return 0; };
  return {{ranks, 42, 4000, 512, random}, {ranks, 42, 700, 33, random},
          {ranks, 8, 100, 6, to_one},     {ranks, 8, 64, 5, from_one},
          {ranks, 8, 64, 5, none},        {ranks, 900, 50000, 1, random}};
}

void exchange_rows(World& world) {
  ProcessGroups groups =
      world.make_groups(RankLayout(world.size(), world.size(), 64), seconds(60), DeviceKind::cuda);
  Stream stream = Stream::cuda();
  stream.watch([&groups] { groups.poll(); });
  for (const ExchangeScene& scene : scenes(world.size())) {
    groups.layout = RankLayout(world.size(), world.size(), scene.experts);
    there_and_back(scene, groups, stream);
  }
  agree_on_failures(world, 0);
}

// On both groups of a dense model's rank; and two groups at work at the same time.
void reduce_gradients(World& world) {
  ProcessGroups groups =
      world.make_groups(RankLayout(world.size(), 1, 0), seconds(60), DeviceKind::cuda);
  Stream compute = Stream::cuda(), communication = Stream::cuda();
  for (Stream* stream : {&compute, &communication}) stream->watch([&groups] { groups.poll(); });
  for (int round = 0; round < 3; ++round) {
    reduce_and_gather(*groups.data, compute, communication);
    reduce_and_gather(*groups.expert_data, compute, communication);
  }
  agree_on_failures(world, 0);
}

// As the thread of an asynchronous save does. Without more ado a new thread is on GPU 0.
int64_t wait_on_a_new_thread(World& world) {
  Stream stream = Stream::cuda();
  const Event event = stream.record();
  int gpu = -1;
  std::thread([&] {
    Stream::wait_on_host(event);
    gpu = gpu::used();
  }).join();
  const int64_t failed = agree_on_failures(world, gpu != gpu::used());
  if (failed > 0)
    std::fprintf(stderr, "rank %d: a thread waits on GPU %d, its stream is on GPU %d\n",
                 world.rank(), gpu, gpu::used());
  return failed;
}

// More calls at once than a group keeps an eye on: the host waits for places.
void enqueue_many(World& world) {
  ProcessGroups groups =
      world.make_groups(RankLayout(world.size(), 1, 0), seconds(60), DeviceKind::cuda);
  Stream stream = Stream::cuda();
  stream.watch([&groups] { groups.poll(); });
  for (int i = 0; i < 1000; ++i) barrier(*groups.data, stream);
  stream.synchronize();
  agree_on_failures(world, 0);
}

int64_t run_all(World& world) {
  if (const int64_t failed = wait_on_a_new_thread(world); failed > 0) return failed;
  for (const CommunicatorCase& c : communicator_cases()) {
    if (!applies(c, world.size())) continue;
    if (const int64_t failed = run_case(world, c); failed > 0) {
      std::fprintf(stderr, "%s: failed\n", c.name.c_str());
      return failed;
    }
  }
  enqueue_many(world);
  exchange_rows(world);
  reduce_gradients(world);
  return 0;
}

}  // namespace
}  // namespace moemamba

int main() {
  return moemamba::run_on_gpus("all promises kept over NCCL", moemamba::run_all);
}
