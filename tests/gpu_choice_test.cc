// Which GPU a rank takes, and what it hears where there is none for it. Needs no GPU.
#include "parallel/gpu_choice.h"

#include <gtest/gtest.h>

#include "core/gpu_architectures.h"
#include "parallel/communicator_nccl.h"
#include "tests/support/temporary_folder.h"

namespace moemamba {
namespace {

// A machine's GPUs as each of its ranks sees them.
std::vector<SeenGpus> machine(const std::string& name, int ranks, int gpus,
                              const std::string& visible = "") {
  SeenGpus seen{.hostname = name, .visible = visible};
  for (int i = 0; i < gpus; ++i) seen.gpus.push_back(name + "-" + std::to_string(i));
  return std::vector<SeenGpus>(size_t(ranks), seen);
}
std::vector<SeenGpus> operator+(std::vector<SeenGpus> a, const std::vector<SeenGpus>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}
using Chosen = std::vector<int>;

TEST(GpuChoice, RanksOfAMachineTakeItsGpusInTurn) {
  EXPECT_EQ(choose_gpus(machine("a", 1, 1)), (Chosen{0}));
  EXPECT_EQ(choose_gpus(machine("a", 2, 8)), (Chosen{0, 1}));
  EXPECT_EQ(choose_gpus(machine("a", 2, 2) + machine("b", 3, 4) + machine("c", 1, 1)),
            (Chosen{0, 1, 0, 1, 2, 0}));
  const auto a = machine("a", 1, 2), b = machine("b", 1, 2);
  EXPECT_EQ(choose_gpus(a + b + a + b), (Chosen{0, 0, 1, 1}));
}

// As srun --gpus-per-task=1 does: every rank sees one, and each calls it 0.
TEST(GpuChoice, ARankThatAloneSeesItsGpusTakesTheFirst) {
  std::vector<SeenGpus> ranks;
  for (int i = 0; i < 8; ++i)
    ranks.push_back({.hostname = "a", .visible = "0", .gpus = {"gpu" + std::to_string(i)}});
  EXPECT_EQ(choose_gpus(ranks), Chosen(8, 0));
}

TEST(GpuChoice, SaysHowManyRanksAMachineTakes) {
  const auto message = [](const std::vector<SeenGpus>& ranks) {
    return message_of([&] { choose_gpus(ranks); });
  };
  EXPECT_EQ(message(machine("a", 3, 2))
                .find("3 ranks were started on a, which has 2 GPUs; start 2 "
                      "ranks per node, or use --device=cpu"),
            0u);
  EXPECT_EQ(message(machine("a", 4, 4) + machine("b", 2, 1, "3"))
                .find("2 ranks were started on b, which has 1 GPU (CUDA_VISIBLE_DEVICES=3); start "
                      "1 rank per node, or use --device=cpu"),
            0u);
  auto overlapping = machine("a", 1, 2);
  overlapping.push_back({.hostname = "a", .gpus = {"a-0"}});
  EXPECT_EQ(message(overlapping).find("ranks 0 and 1 on a would take the same GPU"), 0u);
}

TEST(GpuChoice, NamesEveryKindOfGpuOnce) {
  EXPECT_EQ(gpu_kinds_text({"NVIDIA H100", "NVIDIA H100"}), "2 x NVIDIA H100");
  EXPECT_EQ(gpu_kinds_text({"NVIDIA H100", "NVIDIA A100", "NVIDIA H100"}),
            "1 x NVIDIA A100, 2 x NVIDIA H100: different GPUs, of which the slowest sets the pace");
}

TEST(GpuArchitectures, RunWhereCudaSays) {
  const std::string ours = "80-real 90a";
  for (const int capability : {80, 86, 87, 89, 90}) EXPECT_TRUE(gpu::runs_on(ours, capability));
  for (const int capability : {50, 75, 100, 103, 120}) EXPECT_FALSE(gpu::runs_on(ours, capability));
  EXPECT_TRUE(gpu::runs_on("80", 120));  // its PTX
  EXPECT_FALSE(gpu::runs_on("86-real", 80));
  EXPECT_TRUE(gpu::runs_on("80-virtual", 80));
  EXPECT_FALSE(gpu::runs_on("", 90));
}

TEST(GpuArchitectures, NameTheGpuThatHasNoKernels) {
  const gpu::Facts old{.name = "old", .capability = 75}, fit{.name = "fit", .capability = 90};
  EXPECT_EQ(gpu::missing_kernels("80-real 90a", {fit, fit}, 2), "");
  EXPECT_EQ(gpu::missing_kernels("80-real 90a", {fit, old}, 1), "");
  EXPECT_EQ(gpu::missing_kernels("80-real 90a", {fit, old}, 2),
            "GPU 1, old, has compute capability 7.5, for which this build has no kernels (80-real "
            "90a); hide it with CUDA_VISIBLE_DEVICES, or build with "
            "-DCMAKE_CUDA_ARCHITECTURES=75");
}

// In a build without NCCL two GPUs are not to be had.
TEST(NcclCommunicator, SaysWhereItIsMissing) {
  if (!nccl_version().empty()) return;
  const std::string message = message_of([] {
    make_nccl_communicator(std::move(make_thread_group(1, "data", std::chrono::seconds(1)).front()),
                           {0, 1}, std::chrono::seconds(1), 75);
  });
  EXPECT_EQ(message,
            "group data: this build has no NCCL, so a GPU run has one rank; install NCCL and "
            "configure again, or use --device=cpu");
}

}  // namespace
}  // namespace moemamba
