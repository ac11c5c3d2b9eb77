#include <dlfcn.h>
#include <gtest/gtest.h>

#include <atomic>
#include <barrier>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "launcher/agent_outbox.h"
#include "runtime/commands.h"
#include "runtime/plan.h"
#include "tests/support/in_world.h"
#include "tests/support/temporary_folder.h"
#include "tests/support/training.h"

// glibc's own allocator, under the names that it keeps for programs that replace malloc().
extern "C" void* __libc_malloc(size_t bytes);
extern "C" void* __libc_calloc(size_t count, size_t bytes);
extern "C" void* __libc_realloc(void* old, size_t bytes);
extern "C" void* __libc_memalign(size_t alignment, size_t bytes);

namespace moemamba {
namespace {

// Every allocation of the process while it is on, but for OpenBLAS' own: for some processors its
// kernels of small products take and free a buffer in each call.
struct Counter {
  std::atomic<bool> on{false};
  std::atomic<int64_t> calls{0};
  std::atomic<int64_t> bytes{0};
  std::atomic<int64_t> buffers{0};         // bytes of Buffers alone, which start on borders
  std::atomic<int64_t> largest_buffer{0};  // the last to grow; for one thread
  void count_buffer(size_t size) {
    if (!on.load(std::memory_order_relaxed)) return;
    buffers += int64_t(size);
    largest_buffer = std::max(largest_buffer.load(), int64_t(size));
  }
  void count(size_t size, void* caller) {
    if (!on.load(std::memory_order_relaxed)) return;
    Dl_info home{};
    if (dladdr(caller, &home) && home.dli_fname && std::strstr(home.dli_fname, "libopenblas"))
      return;
    ++calls;
    bytes += int64_t(size);
  }
};
constinit Counter counter;  // malloc() has no arguments to pass it in

}  // namespace
}  // namespace moemamba

// operator new calls malloc, Buffer aligned_alloc.
extern "C" __attribute__((visibility("default"))) void* malloc(size_t bytes) {
  moemamba::counter.count(bytes, __builtin_return_address(0));
  return __libc_malloc(bytes);
}
extern "C" __attribute__((visibility("default"))) void* calloc(size_t count, size_t bytes) {
  moemamba::counter.count(count * bytes, __builtin_return_address(0));
  return __libc_calloc(count, bytes);
}
extern "C" __attribute__((visibility("default"))) void* realloc(void* old, size_t bytes) {
  moemamba::counter.count(bytes, __builtin_return_address(0));
  return __libc_realloc(old, bytes);
}
extern "C" __attribute__((visibility("default"))) void* aligned_alloc(size_t alignment,
                                                                      size_t bytes) {
  moemamba::counter.count(bytes, __builtin_return_address(0));
  moemamba::counter.count_buffer(bytes);
  return __libc_memalign(alignment, bytes);
}
extern "C" __attribute__((visibility("default"))) int posix_memalign(void** out, size_t alignment,
                                                                     size_t bytes) {
  moemamba::counter.count(bytes, __builtin_return_address(0));
  *out = __libc_memalign(alignment, bytes);
  return *out ? 0 : ENOMEM;
}

namespace moemamba {
namespace {

// What steps 2 .. 6 of a training allocate, over all ranks and threads.
void expect_nothing_after_step_one(const TrainingCase& c, int ranks, int expert) {
  const TrainerOptions options = trainer_options(c);
  std::barrier<> meet(ranks);
  in_world(RankLayout(ranks, expert, int(c.experts)), [&](ProcessGroups& groups) {
    Trainer trainer(groups, options);
    trainer.step(0);
    trainer.wait_weights();
    meet.arrive_and_wait();
    if (groups.rank == 0) counter.calls = counter.bytes = 0, counter.on = true;
    meet.arrive_and_wait();
    for (int64_t k = 1; k < 6; ++k) trainer.step(k);
    trainer.wait_weights();
    meet.arrive_and_wait();
    counter.on = false;
  });
  EXPECT_EQ(counter.calls, 0) << counter.bytes << " bytes; " << ranks << " ranks, " << c.threads
                              << " threads each";
}

TEST(Allocation, IsCounted) {
  counter.calls = 0, counter.on = true;
  ::operator delete(::operator new(100));
  Buffer buffer(DeviceKind::cpu, 100);
  counter.on = false;
  EXPECT_EQ(counter.calls, 2);
}

// Sizes that fill every buffer to its 64-byte border: 128 tokens, 9 counts beside 7 facts.
TEST(Allocation, OfBuffersIsWhatIsPlannedToTheByte) {
  for (const char* model : {"pattern: 'mamba, moe'", "pattern: 'attention, moe' heads: 4",
                            "pattern: 'inner_moe' projections: GATE projection_hidden: 9"}) {
    const TrainingCase c{
        .experts = 3, .blocks = 3, .batch = 16, .micro_batch = 8, .length = 16, .model = model};
    const TrainerOptions options = trainer_options(c);
    const RankLayout layout(1, 1, int(c.experts));
    const PlannedBytes planned = planned_bytes(options, layout);
    in_world(layout, [&](ProcessGroups& groups) {
      counter.buffers = 0, counter.on = true;
      Trainer trainer(groups, options);
      counter.on = false;
      EXPECT_EQ(counter.buffers, planned.trainer.total()) << model;
      EXPECT_EQ(trainer.bytes(), planned.trainer) << model;
      // Steps add the operators' scratch and nothing else.
      counter.largest_buffer = 0, counter.on = true;
      for (int64_t k = 0; k < 3; ++k) trainer.step(k);
      counter.on = false;
      EXPECT_GT(counter.largest_buffer, 0) << model;
      EXPECT_LE(counter.largest_buffer, planned.scratch) << model;
    });
  }
}

TEST(Allocation, EndsWithStepOne) {
  for (int threads : {1, 3})
    for (auto [ranks, expert] : {std::pair{1, 1}, {2, 1}, {2, 2}}) {
      expect_nothing_after_step_one({.batch = 8, .threads = threads}, ranks, expert);
      expect_nothing_after_step_one({.top_k = 2,
                                     .batch = 8,
                                     .micro_batch = 2,
                                     .exchange_rows = 0.3,
                                     .activation = ModelConfig::SWIGLU,
                                     .reset_at_documents = true,
                                     .threads = threads},
                                    ranks, expert);
    }
}

// The loop around the steps: metrics, progress, and the question whether to stop, which is asked
// before each step and so can begin and end the count. watched: each rank has what an agent reads.
void expect_nothing_in_the_loop(int ranks, bool watched) {
  TemporaryFolder folder;
  std::vector<Activity> activities(static_cast<size_t>(ranks));
  PosixFileSystem files;
  TrainRequest request{.run = folder / "run"};
  request.model.set_width(16);
  request.model.set_blocks(1);
  request.model.set_experts(2);
  request.train.set_steps(9);
  request.train.set_log_interval(1);
  request.train.set_sequence_length(16);
  request.train.set_global_batch_size(4);
  request.data.add_train(synthetic_tokens(61));
  in_world(RankLayout(ranks, ranks, 2), [&](ProcessGroups& groups) {
    TrainRequest own = request;
    own.stop_wanted = [step = 0, rank = groups.rank]() mutable {
      if (rank == 0 && step == 2) counter.calls = counter.bytes = 0, counter.on = true;
      if (rank == 0 && step == 7) counter.on = false;  // the last step writes weights
      ++step;
      return false;
    };
    AgentOutbox outbox(groups.rank == 0);
    if (watched) {
      groups.tell(&activities[size_t(groups.rank)]);
      own.on_step = [&](const StepRecord& record, const std::vector<double>& choices) {
        outbox.add(Agent::Step{.step = record.step, .seconds = record.seconds.all});
        outbox.add_choices(record.step, 2, choices, record.dropped_rows);
      };
    }
    run_training(files, groups, own);
    EXPECT_EQ(outbox.empty(), !watched);
  });
  EXPECT_EQ(counter.calls, 0) << counter.bytes << " bytes; " << ranks << " ranks";
}

TEST(Allocation, EndsWithStepOneInTheRunsLoopToo) {
  for (int ranks : {1, 2})
    for (bool watched : {false, true}) expect_nothing_in_the_loop(ranks, watched);
}

}  // namespace
}  // namespace moemamba
