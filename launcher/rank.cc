#include "launcher/rank.h"

#include <cstdio>
#include <cstdlib>

#include "core/gpu_architectures.h"
#include "core/schema.h"
#include "launcher/build_facts.h"
#include "launcher/gpu_environment.h"
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

// Where this rank computes. rank 0 says why not on a GPU, where this build could use one. Under a
// supervisor a GPU that is not there is an error of the machine: others may have theirs.
DeviceKind device_of(const RunConfig& config, const World& world, bool supervised) {
  std::string why;
  bool found = false;
  if (config.device() != RunConfig::CPU) {
    const std::vector<gpu::Facts> gpus = gpu::devices(&why);
    if (!gpus.empty()) why = gpu::missing_kernels(gpu::architectures(), gpus, world.node_size());
    found = why.empty();
  }
  const bool on_gpu = config.device() == RunConfig::CUDA || found;
  check(!on_gpu || found, "--device=CUDA: no GPU (", why, "); use --device=CPU");
  const bool is_f32 = config.model().compute_dtype() == ModelConfig::F32;
  const bool could = config.device() != RunConfig::CPU && gpu::build() != "no CUDA";
  check(on_gpu || is_f32 || !supervised || !could, "no GPU (", why,
        "), and the CPU computes in F32 only");
  if (!on_gpu && !is_f32)
    throw BadSettings("model.compute_dtype: the CPU computes in F32 only; set that" +
                      (why.empty() ? std::string(", or --device=AUTO") : ": no GPU (" + why + ")"));
  if (!on_gpu && world.rank() == 0 && !why.empty() && gpu::build() != "no CUDA")
    std::fprintf(stderr, "moemamba: no GPU (%s): on the CPU\n", why.c_str());
  return on_gpu ? DeviceKind::cuda : DeviceKind::cpu;
}

}  // namespace

void run_rank(const RunConfig& config, FunctionRef<void(Rank&)> work, Activity* activity) {
  const std::chrono::milliseconds deadline(
      int64_t(std::max(1.0, config.parallel().deadline_seconds() * 1e3)));
  World world;
  check(world.size() == started_ranks(), started_ranks(), " ranks were started, but MPI knows of ",
        world.size(), "; start them with this Open MPI's mpirun, or with srun --mpi=pmix");
  const DeviceKind device = device_of(config, world, activity != nullptr);
  Facts facts = facts_of(config);
  facts.emplace_back("device found", device == DeviceKind::cuda ? "GPU" : "CPU");
  world.agree(facts, deadline);
  const RankLayout layout(world.size(), config.parallel().expert(),
                          has_routers(config.model()) ? config.model().experts() : 0);
  if (device == DeviceKind::cuda) {
    prepare_nccl_environment();
    const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
    world.choose_gpu(visible ? visible : "", deadline);
  }
  ProcessGroups groups = world.make_groups(layout, deadline, device, kExitRestart);
  if (activity) groups.tell(activity);
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
