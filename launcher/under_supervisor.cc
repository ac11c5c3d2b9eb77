#include "launcher/under_supervisor.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "core/gpu.h"
#include "core/schema.h"
#include "launcher/launch.h"
#include "launcher/process_sweep.h"
#include "launcher/supervisor/hosts.h"
#include "launcher/supervisor/leftovers.h"
#include "runtime/session.h"

namespace moemamba {

namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kSweep = std::chrono::seconds(5);
constexpr auto kBetweenMemory = std::chrono::seconds(5);  // asking a driver takes time

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

// For people, before it is used: as parallel/gpu_choice.h will have it.
std::string gpu_name(const RunConfig& config) {
  if (config.device() == RunConfig::CPU) return "";
  const std::vector<gpu::Facts> gpus = gpu::devices();
  const int own = gpus.size() == 1 ? 0 : started_local_rank();
  return size_t(own) < gpus.size() ? concat(gpus[size_t(own)].name, " (", own, ")") : "";
}

// Open MPI's names on this machine, of the attempt at hand: the next one removes what they leave
// here, where no supervisor sees to it.
std::string leftovers_file() {
  return join_path(variable(kSupervisorVariable), "leftovers-" + this_host());
}

void keep_leftovers(const Leftovers& leftovers) {
  PosixFileSystem files;
  try {
    leftovers.save(files, leftovers_file());
  } catch (const Error&) {  // a full disk: then they stay
  }
}

void sweep_earlier_attempts() {
  const std::string key = variable(kRunKeyVariable), job = variable(kJobVariable);
  if (key.empty() || started_local_rank() != 0) return;
  const ProcessMark mark{.has = {concat(kRunKeyVariable, "=", key)},
                         .lacks = {concat(kJobVariable, "=", job)}};
  Leftovers own, earlier;
  own.learn_from_rank(getpid());
  earlier.learn_from_file(leftovers_file());
  for (const FoundProcess& process : marked_processes(mark)) earlier.learn_from_rank(process.pid);
  const Swept swept = sweep_processes(mark, kSweep);
  if (!swept.killed.empty())
    std::fprintf(stderr, "moemamba: rank %d: ended what an earlier attempt has left: %s\n",
                 started_rank(), describe(swept.killed).c_str());
  if (!swept.left.empty())
    std::fprintf(stderr, "moemamba: rank %d: still there, with SIGKILL: %s; going on beside it\n",
                 started_rank(), describe(swept.left).c_str());
  earlier.spare(own);
  if (swept.left.empty()) earlier.remove();
  earlier.learn_from_rank(getpid());
  keep_leftovers(earlier);
}

// What is used of the GPU, by anybody, now and then.
void watch_gpu_memory(Agent& agent, Clock::time_point& asked, int64_t total) {
  if (total == 0 || Clock::now() - asked < kBetweenMemory) return;
  asked = Clock::now();
  agent.set_gpu_bytes(total - gpu::free_bytes());
}

}  // namespace

std::unique_ptr<Agent> join_supervisor(const RunConfig& config, std::function<void()> stop) {
  const std::string folder = variable(kSupervisorVariable), job = variable(kJobVariable);
  if (folder.empty() || job.empty() || started_rank() < 0) return nullptr;
  auto agent =
      std::make_unique<Agent>(Agent::Options{.folder = folder,
                                             .job = job,
                                             .rank = started_rank(),
                                             .ranks = started_ranks(),
                                             .gpu = gpu_name(config),
                                             .fence_seconds = config.launch().fence_seconds(),
                                             .stop = std::move(stop),
                                             .exit = {}});
  agent->wait_welcome();  // an attempt that was replaced sweeps nothing
  sweep_earlier_attempts();
  return agent;
}

void report_to(Agent* agent, const ProcessGroups& groups, TrainRequest& request) {
  if (!agent) return;
  request.lease_generation = [agent] { return agent->generation(); };
  request.on_event = [agent](const RunEvent& event) { agent->note(event); };
  const BatchShare share =
      share_of_batch(request.train.global_batch_size(), request.train.routing_group(),
                     request.train.micro_batch_size(), groups.rank, groups.layout.ranks());
  const int64_t total =
      groups.device == DeviceKind::cuda ? gpu::devices()[size_t(gpu::used())].bytes : 0;
  request.on_step = [agent, total, tokens = share.count * request.train.sequence_length(),
                     experts = request.model.experts(), speaks = groups.rank == 0,
                     asked = Clock::time_point{}](const StepRecord& record,
                                                  const std::vector<double>& choices) mutable {
    agent->report({.step = record.step,
                   .seconds = record.seconds.all,
                   .busy_seconds = std::max(0.0, record.seconds.all - record.seconds.waiting),
                   .exchange_seconds = record.seconds.exchange,
                   .tokens = tokens,
                   .rows = record.rows,
                   .loss = record.loss,
                   .grad_norm = record.grad_norm,
                   .lr = record.lr,
                   .skipped_steps = record.skipped_steps,
                   .failed_saves = record.failed_saves});
    if (speaks) agent->report_choices(record.step, experts, choices, record.dropped_rows);
    watch_gpu_memory(*agent, asked, total);
  };
}

bool run_with_goodbye(Agent* agent, FunctionRef<bool()> work) {
  const auto say = [&](Goodbye::Reason reason, const std::string& text) {
    if (agent) agent->say_goodbye(reason, text);
  };
  try {
    const bool stopped = work();
    say(stopped ? Goodbye::STOPPED : Goodbye::DONE, stopped ? "ended as asked" : "done");
    return stopped;
  } catch (const BadSettings& error) {
    say(Goodbye::SETTINGS, error.what());
    throw;
  } catch (const PeerLost& error) {
    say(Goodbye::LOST, error.what());
    throw;
  } catch (const RunEnds& error) {
    say(Goodbye::FINAL, error.what());
    throw;
  } catch (const std::exception& error) {
    say(Goodbye::FAILED, error.what());
    throw;
  }
}

}  // namespace moemamba
