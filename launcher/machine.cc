#include "launcher/machine.h"

#include <hwloc.h>

#include <algorithm>
#include <memory>
#include <type_traits>

#include "core/error.h"
#include "launcher/control_groups.h"

namespace moemamba {

namespace {

struct DestroyTopology {
  void operator()(hwloc_topology_t topology) const { hwloc_topology_destroy(topology); }
};
using Topology = std::unique_ptr<std::remove_pointer_t<hwloc_topology_t>, DestroyTopology>;
struct FreeBitmap {
  void operator()(hwloc_bitmap_t bitmap) const { hwloc_bitmap_free(bitmap); }
};

// Cores with at least one hardware thread in `set`.
int cores_in(hwloc_topology_t topology, hwloc_const_bitmap_t set) {
  int count = 0;
  for (hwloc_obj_t core = nullptr;
       (core = hwloc_get_next_obj_by_type(topology, HWLOC_OBJ_CORE, core));)
    count += hwloc_bitmap_intersects(core->cpuset, set);
  return count > 0 ? count : std::max(1, hwloc_bitmap_weight(set));  // no cores known: threads
}

// instead: what a user sets where hwloc fails.
Topology load_topology(const char* instead) {
  hwloc_topology_t loaded = nullptr;
  check(hwloc_topology_init(&loaded) == 0, "hwloc cannot start; set ", instead);
  Topology topology(loaded);
  check(hwloc_topology_load(loaded) == 0, "hwloc cannot read the machine's topology; set ",
        instead);
  return topology;
}

}  // namespace

int threads_per_rank(int ranks) {
  const Topology topology = load_topology("train.threads");
  const std::unique_ptr<hwloc_bitmap_s, FreeBitmap> bound(hwloc_bitmap_alloc());
  const hwloc_const_bitmap_t allowed = hwloc_topology_get_allowed_cpuset(topology.get());
  const int machine = cores_in(topology.get(), allowed);
  const int share = std::max(1, machine / std::max(1, ranks));
  if (hwloc_get_cpubind(topology.get(), bound.get(), HWLOC_CPUBIND_PROCESS) != 0) return share;
  const int own = cores_in(topology.get(), bound.get());
  // A binding to fewer cores may be this rank's alone or one that all ranks share (taskset around
  // mpirun, a socket); the even share of the machine is never too many in the first case.
  return std::max(1, std::min(own, share));
}

int64_t machine_memory() {
  const Topology topology = load_topology("--memory");
  int64_t bytes = int64_t(hwloc_get_root_obj(topology.get())->total_memory);
  check(bytes > 0, "hwloc does not know this machine's memory; give --memory");
  return std::min(bytes, group_memory_limit().value_or(bytes));  // a container may have less of it
}

Processors find_processors() {
  const Topology loaded = load_topology("train.threads");
  hwloc_topology_t topology = loaded.get();
  const auto count = [&](hwloc_obj_type_t type) {
    return std::max(0, hwloc_get_nbobjs_by_type(topology, type));
  };
  Processors found{.packages = count(HWLOC_OBJ_PACKAGE),
                   .cores = cores_in(topology, hwloc_topology_get_complete_cpuset(topology)),
                   .threads = count(HWLOC_OBJ_PU),
                   .usable_cores = cores_in(topology, hwloc_topology_get_allowed_cpuset(topology)),
                   .memory_nodes = count(HWLOC_OBJ_NUMANODE)};
  if (const hwloc_obj_t package = hwloc_get_obj_by_type(topology, HWLOC_OBJ_PACKAGE, 0))
    if (const char* model = hwloc_obj_get_info_by_name(package, "CPUModel")) found.model = model;
  const std::unique_ptr<hwloc_bitmap_s, FreeBitmap> bound(hwloc_bitmap_alloc());
  if (hwloc_get_cpubind(topology, bound.get(), HWLOC_CPUBIND_PROCESS) == 0)
    found.usable_cores = std::min(found.usable_cores, cores_in(topology, bound.get()));
  return found;
}

}  // namespace moemamba
