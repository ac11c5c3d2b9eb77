// A plan against trainers that really run, and `moemamba plan` as a user meets it.
#include "runtime/plan.h"
#include "runtime/checkpoint_writer.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "core/schema.h"
#include "launcher/plan_text.h"
#include "tests/support/in_world.h"
#include "tests/support/program.h"
#include "tests/support/systems.h"
#include "tests/support/training.h"
#include "tests/support/wires.h"

namespace moemamba {
namespace {

constexpr int64_t kPlenty = int64_t{1} << 40;

RankLayout layout_of(const TrainerOptions& options, int ranks, int expert) {
  return {ranks, options.sizes.E > 0 ? expert : 1, int(options.sizes.E)};
}

// Every rank's trainer is made, and takes `steps` steps. No rank takes more than the plan says, and
// rank 0 takes it to the byte.
void expect_as_planned(const TrainingCase& c, int ranks, int expert, bool fills_arena) {
  const TrainerOptions options = trainer_options(c);
  const RankLayout layout = layout_of(options, ranks, expert);
  const Plan plan = make_plan(options, layout, kPlenty);
  const std::string where = concat(c.model, ": ", ranks, " ranks, ", expert, " for experts");
  in_world(layout, [&](ProcessGroups& groups) {
    Trainer trainer(groups, options);
    for (int64_t k = 0; k < c.steps; ++k) trainer.step(k);
    trainer.wait_weights();
    const TrainerBytes bytes = trainer.bytes();
    const Arena& arena = trainer.session().arena;
    EXPECT_LE(bytes.total(), plan.bytes.trainer.total()) << where;
    EXPECT_LE(arena.peak(), plan.bytes.trainer.activations) << where;
    if (groups.rank > 0) return;
    PosixFileSystem files;
    const CheckpointWriter writer(files, groups, trainer.session().store, {});
    EXPECT_EQ(writer.staged_bytes(), plan.bytes.staging) << where;
    EXPECT_EQ(bytes, plan.bytes.trainer) << where;
    if (fills_arena) {
      EXPECT_EQ(arena.peak(), plan.bytes.trainer.activations) << where;
    }
  });
}

TEST(Plan, IsWhatEverySystemTakesToTheByte) {
  for (const System& system : kSystems)
    for (auto [ranks, expert] : {std::pair{1, 1}, {2, 1}, {2, 2}, {4, 2}, {4, 4}})
      expect_as_planned({.batch = 8, .exchange_rows = 1e6, .steps = 1, .model = system.model},
                        ranks, expert, true);
}

TEST(Plan, IsWhatUnevenExpertsBatchesAndMicroBatchesTake) {
  for (auto [ranks, expert] : {std::pair{1, 1}, {2, 2}, {4, 4}, {4, 2}}) {
    expect_as_planned({.experts = 42, .batch = 8, .exchange_rows = 1e6, .steps = 1}, ranks, expert,
                      true);
    for (double exchange_rows : {0.3, 1.25})
      expect_as_planned({.experts = 42,
                         .top_k = 2,
                         .batch = 7,
                         .micro_batch = 1,
                         .exchange_rows = exchange_rows,
                         .steps = 2},
                        ranks, expert, false);
  }
}

// Counts what its rank sends to others.
class CountingWire final : public Wire {
 public:
  CountingWire(std::unique_ptr<Communicator> inner, int64_t& sent)
      : Wire(std::move(inner)), sent_(sent) {}
  void all_to_all(Stream& stream, const AllToAll& call) override {
    stream.submit([this, call] {
      for (int r = 0; r < size(); ++r) sent_ += r == rank() ? 0 : call.send_bytes[r];
    });
    Wire::all_to_all(stream, call);
  }
  void all_gather(Stream& stream, const void* send, void* recv, int64_t bytes) override {
    stream.submit([this, bytes] { sent_ += (size() - 1) * bytes; });
    Wire::all_gather(stream, send, recv, bytes);
  }

 private:
  int64_t& sent_;
};

struct Sent {
  int64_t data = 0, expert_data = 0, expert = 0, control = 0;
};

// What each rank sends in one step.
std::vector<Sent> sent_in_a_step(const TrainerOptions& options, const RankLayout& layout) {
  std::vector<Sent> all(size_t(layout.ranks()));
  in_world(layout, [&](ProcessGroups& groups) {
    Sent& sent = all[size_t(groups.rank)];
    const auto count = [](std::unique_ptr<Communicator>& group, int64_t& bytes) {
      group = std::make_unique<CountingWire>(std::move(group), bytes);
    };
    count(groups.data, sent.data);
    count(groups.expert_data, sent.expert_data);
    count(groups.expert, sent.expert);
    count(groups.control, sent.control);
    Trainer trainer(groups, options);
    trainer.step(0);
    trainer.wait_weights();
    trainer.session().communication.synchronize();
  });
  return all;
}

TEST(Plan, KnowsWhatARankSends) {
  for (auto [ranks, expert] : {std::pair{1, 1}, {2, 2}, {4, 2}, {4, 1}, {3, 3}}) {
    const TrainingCase c{.experts = 6, .batch = 12, .micro_batch = 2, .length = 40};
    const TrainerOptions options = trainer_options(c);
    const RankLayout layout(ranks, expert, int(c.experts));
    const PlannedWires planned = make_plan(options, layout, kPlenty).wires;
    int64_t rows = 0;
    for (const Sent& sent : sent_in_a_step(options, layout)) {
      EXPECT_EQ(sent.data, planned.data.total()) << ranks << " ranks";
      EXPECT_EQ(sent.expert_data, planned.expert_data.total()) << ranks << " ranks";
      EXPECT_EQ(sent.control, planned.control) << ranks << " ranks";
      rows += sent.expert;
    }
    // Routing at random is even only on the average over ranks and experts.
    const auto expected = double(planned.expert.total() * ranks);
    EXPECT_NEAR(double(rows), expected, 0.25 * expected) << ranks << " ranks";
  }
}

TEST(Plan, FindsTheLargestMicroBatch) {
  const TrainerOptions options = trainer_options({.batch = 24, .routing_group = 2, .length = 9});
  const RankLayout layout(2, 1, 5);
  std::vector<int64_t> totals;  // of 1, 2, ... routing groups
  for (int64_t groups = 1; groups <= 6; ++groups) {
    TrainerOptions with = options;
    with.micro_batch = 2 * groups;
    totals.push_back(planned_bytes(with, layout).total());
  }
  EXPECT_TRUE(std::ranges::is_sorted(totals, std::less_equal()));
  EXPECT_EQ(largest_micro_batch(options, layout, totals[0] - 1), 0);
  for (int64_t groups = 1; groups <= 6; ++groups) {
    EXPECT_EQ(largest_micro_batch(options, layout, totals[size_t(groups - 1)]), 2 * groups);
    const int64_t next = groups < 6 ? totals[size_t(groups)] : kPlenty;
    EXPECT_EQ(largest_micro_batch(options, layout, next - 1), 2 * groups);
  }
  EXPECT_EQ(largest_micro_batch(options, layout, kPlenty), 12) << "more than the rank's share";
}

TEST(Plan, NamesTheActivationsThatAddUpToTheArena) {
  for (const System& system : kSystems) {
    const TrainerOptions options = trainer_options({.model = system.model});
    const PlannedBytes bytes = planned_bytes(options, layout_of(options, 2, 2));
    int64_t sum = 0, exchange = 0;
    for (const Arena::Taken& taken : bytes.largest) {
      sum += taken.bytes;
      if (std::string(taken.who).starts_with("exchange ")) exchange += taken.bytes;
    }
    EXPECT_EQ(sum, bytes.trainer.activations) << system.name;
    EXPECT_EQ(exchange, bytes.exchange) << system.name;
    EXPECT_EQ(bytes.exchange > 0, options.sizes.E > 0) << system.name;
  }
}

// What a rank hears before it takes any of its GPU's memory.
TEST(Plan, OfAGpuThatIsTooSmallNamesThePartsAndTheMicroBatchThatFits) {
  TrainerOptions options = trainer_options(
      TrainingCase{.experts = 8, .width = 256, .batch = 256, .length = 512,
                   .model = "compute_dtype: BF16"});
  const RankLayout layout(1, 1, 8);
  options.device = DeviceKind::cuda;
  const int64_t needed = planned_bytes(options, layout).total();
  EXPECT_NO_THROW(check_gpu_memory(options, layout, needed));
  const auto message = [&](int64_t free) {
    try {
      check_gpu_memory(options, layout, free);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("it fits");
  };
  const std::string text = message(needed - 1);
  for (const char* part : {"does not fit this rank's GPU: it takes ", " GiB are free",
                           "activations ", "largest activations: "})
    EXPECT_NE(text.find(part), std::string::npos) << text;
  const std::string fits = "the largest train.micro_batch_size that fits is ";
  ASSERT_NE(text.find(fits), std::string::npos) << text;
  options.micro_batch = std::stoll(text.substr(text.find(fits) + fits.size()));
  EXPECT_LT(options.micro_batch, 256);
  EXPECT_NO_THROW(check_gpu_memory(options, layout, needed - 1));
  EXPECT_NE(message(1 << 20).find("not even one routing group fits"), std::string::npos);
}

// What the kernels of a GPU do not take is wrong before anything is planned or trained there.
TEST(Plan, OfAGpuRefusesWhatItsKernelsDoNotTake) {
  const auto message = [](const TrainingCase& c, DeviceKind device) {
    TrainerOptions options = trainer_options(c);
    options.device = device;
    try {
      planned_bytes(options, RankLayout(1, 1, int(c.experts)));
    } catch (const BadSettings& error) {
      return std::string(error.what());
    }
    return std::string("it is fine");
  };
  const std::string rest = "; lower it, or set --device=CPU";
  const std::string head = "model.head_width (model.width / model.heads where it is 0): ";
  const std::tuple<TrainingCase, TrainingCase, std::string> cases[] = {
      {{.experts = 1024},
       {.experts = 1025},
       "model.experts: a GPU takes a number of experts of up to 1024, found 1025" + rest},
      {{.width = 8192, .model = "blocks: 1 expert_hidden: 8"},
       {.width = 8193, .model = "blocks: 1 expert_hidden: 8"},
       "model.width: a GPU takes rows of up to 8192, found 8193" + rest},
      {{.model = "dt_rank: 8192 mamba_norms: true"},
       {.model = "dt_rank: 8193 mamba_norms: true"},
       "model.dt_rank: a GPU takes normalised rows of up to 8192, found 8193" + rest},
      {{.model = "dt_rank: 8193"},
       {.experts = 1025, .model = "pattern: 'attention, moe' head_width: 257"},
       "model.experts: a GPU takes a number of experts of up to 1024, found 1025" + rest + "\n" +
           head + "a GPU takes heads of up to 256, found 257" + rest},
      {{.model = "pattern: 'attention, moe' head_width: 256"},
       {.model = "pattern: 'attention, moe' head_width: 257"},
       head + "a GPU takes heads of up to 256, found 257" + rest}};
  for (const auto& [taken, refused, text] : cases) {
    EXPECT_EQ(message(taken, DeviceKind::cuda), "it is fine");
    EXPECT_EQ(message(refused, DeviceKind::cuda), text);
    EXPECT_EQ(message(refused, DeviceKind::cpu), "it is fine");
  }
}

// Activations in bf16 take half; a checkpoint's copy lies in the host's memory.
TEST(Plan, OfAGpuKnowsItsComputeType) {
  TrainerOptions options = trainer_options(TrainingCase{.batch = 16, .length = 64});
  options.device = DeviceKind::cuda;
  const PlannedBytes f32 = planned_bytes(options, RankLayout(1, 1, 5));
  options.sizes.compute = DType::bf16;
  const PlannedBytes bf16 = planned_bytes(options, RankLayout(1, 1, 5));
  EXPECT_LT(bf16.trainer.activations, f32.trainer.activations);
  EXPECT_EQ(bf16.trainer.values, f32.trainer.values * 3 / 2);
  EXPECT_EQ(bf16.trainer.moments, f32.trainer.moments);
  EXPECT_EQ(bf16.staging, 0);
  EXPECT_GT(bf16.workspace, 0);
}

TEST(Sizes, AreReadWithTheirUnits) {
  EXPECT_EQ(read_bytes("80G"), int64_t{80} << 30);
  EXPECT_EQ(read_bytes("80GiB"), int64_t{80} << 30);
  EXPECT_EQ(read_bytes("80GB"), int64_t{80} * 1000 * 1000 * 1000);
  EXPECT_EQ(read_bytes("1.5K"), 1536);
  EXPECT_EQ(read_bytes("4096"), 4096);
  for (const char* text : {"", "G", "-1G", "80Gb", "80 apples", "0", "nan", "inf", "9999999T"})
    EXPECT_EQ(read_bytes(text), 0) << text;
}

class PlanCommand : public ProgramTest {
 protected:
  // Plans `words` with --json; `code` is what it must end with.
  nlohmann::json plan(const std::string& words, int code) const {
    const Result result = shell("$moemamba plan --json " + words);
    EXPECT_EQ(result.code, code) << words << "\n" << result.err;
    EXPECT_EQ(result.err, "");
    return nlohmann::json::parse(result.out);
  }
};

constexpr const char* kMoeMamba25M =
    "--model.vocabulary=50257 --model.width=512 --model.blocks=8 --model.experts=42 "
    "--model.expert_hidden=1536 --model.capacity_factor=1.0 --train.steps=150000 "
    "--train.global_batch_size=64 --train.sequence_length=1024 ";

constexpr const char* kMixtral =
    "--model.pattern=attention,moe --model.vocabulary=32000 --model.width=4096 --model.blocks=32 "
    "--model.heads=32 --model.kv_heads=8 --model.positions=ROPE --model.experts=8 --model.top_k=2 "
    "--model.expert_hidden=14336 --model.expert_activation=SWIGLU --model.norm=RMS_NORM "
    "--model.final_norm=true --train.sequence_length=4096 --train.global_batch_size=256 ";

TEST_F(PlanCommand, KnowsMoeMamba25M) {
  const auto json = plan(std::string(kMoeMamba25M) + "--ranks 8 --gpu-memory 80G", 0);
  EXPECT_EQ(json["parameters_total"], 542228480);
  EXPECT_EQ(json["parameters_active"], 26329088);
  EXPECT_EQ(json["embedding_and_head"], 2 * 50257 * 512);
  EXPECT_EQ(json["checkpoint_bytes"], 12 * (int64_t{542228480} + 2 * 50257 * 512));
  EXPECT_EQ(json["tokens_per_step"], 65536);
  EXPECT_EQ(json["tokens"], 9830400000);
  EXPECT_EQ(json["steps"], 150000);
  EXPECT_EQ(json["memory_per_rank"], int64_t{80} << 30);
  EXPECT_EQ(json["fits"], true);
  EXPECT_EQ(json["largest_micro_batch"], 8);
  EXPECT_EQ(json["flops_per_token"], 311135232);
  int64_t sum = 0;
  for (const auto& [kind, bytes] : json["bytes"].items()) sum += bytes.get<int64_t>();
  EXPECT_EQ(json["bytes_per_rank"], sum);
}

TEST_F(PlanCommand, RefusesWhatNoGpuTakes) {
  const std::string words = std::string(kMoeMamba25M) + "--model.experts=2048 ";
  EXPECT_EQ(shell("$moemamba plan --memory 800G --device=cpu " + words).code, 0);
  const Result result = shell("$moemamba plan --memory 800G --device=cuda " + words);
  EXPECT_EQ(result.code, 2);
  EXPECT_EQ(result.out, "");
  EXPECT_EQ(count(result.err,
                  "model.experts: a GPU takes a number of experts of up to 1024, found "
                  "2048; lower it, or set --device=CPU"),
            1)
      << result.err;
}

TEST_F(PlanCommand, ShowsEveryFieldAndWhichRankHoldsWhichExperts) {
  const auto json =
      plan(std::string(kMoeMamba25M) + "--ranks 8 --memory 80G --parallel.expert=4", 0);
  for (const char* field :
       {"parameters_total", "parameters_active", "embedding_and_head", "bytes_per_rank", "bytes",
        "fits", "memory_per_rank", "largest_micro_batch", "flops_per_token", "wire_bytes_per_step",
        "experts_of_ranks", "checkpoint_bytes", "tokens_per_step", "steps", "tokens"})
    EXPECT_TRUE(json.contains(field)) << field;
  for (const char* group : {"data", "expert_data", "expert", "control"})
    EXPECT_GT(json["wire_bytes_per_step"][group], 0) << group;
  std::vector<int> counts;
  for (const auto& held : json["experts_of_ranks"]) counts.push_back(held["count"]);
  EXPECT_EQ(counts, (std::vector<int>{11, 11, 10, 10}));
  const Result text = shell(std::string("$moemamba plan --ranks 8 --memory 80G ") +
                            "--parallel.expert=4 " + kMoeMamba25M);
  EXPECT_EQ(text.code, 0);
  for (const char* part :
       {"542.2 M (542228480), active 26.3 M", "experts 0-10 on coordinate 0 (ranks 0, 4)",
        "experts 32-41 on coordinate 3 (ranks 3, 7)", "of 80.00 GiB per rank",
        "the largest micro-batch that fits: 8 sequences (a rank's whole share)", "not counted"})
    EXPECT_EQ(count(text.out, part), 1) << part << "\nin\n" << text.out;
}

// The words that a plan says would make it fit.
std::string words_of(const nlohmann::json& with) {
  return concat("--ranks ", with["ranks"].get<int>(),
                " --parallel.expert=", with["parallel.expert"].get<int>(),
                " --train.micro_batch_size=", with["train.micro_batch_size"].get<int64_t>(), " ");
}

TEST_F(PlanCommand, SaysByHowMuchItDoesNotFitAndWhatWouldMakeItFit) {
  const auto small = plan(std::string(kMoeMamba25M) + "--ranks 8 --memory 7G", 1);
  EXPECT_EQ(small["fits"], false);
  EXPECT_EQ(small["bytes_over"],
            small["bytes_per_rank"].get<int64_t>() - small["memory_per_rank"].get<int64_t>());
  const int64_t micro_batch = small["largest_micro_batch"];
  EXPECT_GT(micro_batch, 0);
  EXPECT_LT(micro_batch, 8);
  plan(kMoeMamba25M + words_of(small["fits_with"]) + "--memory 7G", 0);
  plan(concat(kMoeMamba25M, "--ranks 8 --memory 7G --train.micro_batch_size=", micro_batch + 1), 1);

  const auto start = std::chrono::steady_clock::now();
  const auto mixtral = plan(std::string(kMixtral) + "--ranks 2 --memory 150G", 1);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(1));
  EXPECT_EQ(mixtral["largest_micro_batch"], 0);
  EXPECT_GT(mixtral["fits_with"]["ranks"], 2);
  plan(kMixtral + words_of(mixtral["fits_with"]) + "--memory 150G", 0);
}

TEST_F(PlanCommand, OfAModelThatNoMemoryHoldsSaysWhatToReduce) {
  const Result result = shell(std::string("$moemamba plan --ranks 8 --memory 16G ") + kMixtral);
  EXPECT_EQ(result.code, 1);
  for (const char* part : {"does not fit", "per rank, but it has 16.00 GiB: ", " too much",
                           "no number of ranks up to 4096 helps", "a rank still takes", "reduce "})
    EXPECT_EQ(count(result.out, part), 1) << part << "\nin\n" << result.out;
  EXPECT_EQ(plan(std::string(kMixtral) + "--ranks 8 --memory 16G", 1)["fits_with"], nullptr);
}

TEST_F(PlanCommand, TakesTheVocabularyOfTheTokenizer) {
  EXPECT_EQ(plan("--model.width=10 --memory 1T", 0)["embedding_and_head"], 2 * 257 * 10);
  Result result = shell("$moemamba plan --data.tokenizer=no/such.model");
  EXPECT_EQ(result.code, 2);
  EXPECT_EQ(count(result.err, "--data.tokenizer=no/such.model: "), 1) << result.err;
  EXPECT_EQ(count(result.err, "or set model.vocabulary"), 1) << result.err;
  plan("--data.tokenizer=no/such.model --model.vocabulary=100 --memory 1T", 0);
}

TEST_F(PlanCommand, RefusesBadSettingsWithExitCode2) {
  const std::pair<const char*, const char*> cases[] = {
      {"--ranks 8 --parallel.expert=3",
       "must divide the 8 ranks that are planned; try 1, 2, 4 or 8"},
      {"--model.top_k=9", "--model.top_k=9: must be at most the 8 experts"},
      {"--model.expert=3", "did you mean \"--model.experts\"?"},
      {"--train.routing_group=3",
       "16 sequences (train.global_batch_size) are not a multiple of the 3"},
      {"--train.warmup_steps=2000", "must be at most the 1000 steps"},
      {"--gpu-memory much", "much: expected a size such as 80G, 512M or 1.5T"},
      {"--ranks 0", "--ranks"},
      {"--ranks 5000", "--ranks"},
      {"extra", "extra"},
      {"--train.global_batch_size=16777216 --train.sequence_length=1000000",
       "train.micro_batch_size: 16777216 sequences of 1000000 tokens"},
      {"--model.width=65536 --model.blocks=4096 --model.experts=4096 --model.expert_hidden=262144",
       "parameters are more than can be planned"},
  };
  for (const auto& [words, part] : cases) {
    const Result result = shell(std::string("$moemamba plan ") + words);
    EXPECT_EQ(result.code, 2) << words;
    EXPECT_EQ(result.out, "") << words;
    EXPECT_GE(count(result.err, part), 1) << part << "\nin\n" << result.err;
  }
}

}  // namespace
}  // namespace moemamba
