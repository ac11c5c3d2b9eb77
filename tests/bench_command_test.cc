// `moemamba bench` as a user runs it, with tiny settings: what its tables hold, and what it leaves.
#include <filesystem>
#include <regex>
#include <sstream>

#include "core/file.h"
#include "tests/support/program.h"

namespace moemamba {
namespace {

constexpr const char* kTiny =
    " --device=CPU --model.vocabulary=67 --model.width=24 --model.blocks=1 --model.experts=4"
    " --train.global_batch_size=2 --train.sequence_length=20 --train.threads=1";

class BenchCommand : public ProgramTest {
 protected:
  std::string bench(const std::string& words) const {
    const Result result = shell("$moemamba bench " + words + kTiny);
    EXPECT_EQ(result.code, 0) << result.err;
    return result.out;
  }
};

// The numbers of the only line that begins with `name`; anything but numbers separates them.
std::vector<double> numbers(const std::string& table, const std::string& name) {
  std::istringstream lines(table);
  std::vector<double> found;
  int times = 0;
  for (std::string line; std::getline(lines, line);) {
    if (line.rfind(name + "  ", 0) != 0) continue;
    ++times;
    static const std::regex number("[0-9]+(\\.[0-9]+)?");
    line.erase(0, name.size());
    for (std::sregex_iterator at(line.begin(), line.end(), number), end; at != end; ++at)
      found.push_back(std::stod(at->str()));
  }
  EXPECT_EQ(times, 1) << name << "\nin\n" << table;
  for (double value : found) EXPECT_TRUE(value >= 0 && value < 1e12) << name;
  return found;
}

TEST_F(BenchCommand, KernelsNamesEveryOperatorBesideItsCeiling) {
  const std::string table = bench("kernels --repeat 2");
  EXPECT_EQ(count(table, "256 MiB, read and written"), 1) << table;
  EXPECT_EQ(count(table, "2048 x 2048 x 2048, f32"), 1) << table;
  for (const char* name : {"conv forward",
                           "conv backward",
                           "scan forward",
                           "scan backward",
                           "in projection y",
                           "in projection dx",
                           "in projection dW",
                           "out projection y",
                           "expert up y, even",
                           "expert up dx, Zipf",
                           "expert down dW, one expert",
                           "permute",
                           "permute backward",
                           "unpermute",
                           "unpermute backward",
                           "activation forward",
                           "activation backward",
                           "norm forward",
                           "norm backward",
                           "head and loss",
                           "head, loss, gradients",
                           "AdamW"}) {
    const std::vector<double> line = numbers(table, name);
    EXPECT_GE(line.size(), 4u) << name << ": shape, us, rate, share\n" << table;
  }
  EXPECT_EQ(count(table, "% copy\n") + count(table, "% product\n"), 39) << table;
  const std::string gated = bench("kernels --repeat 1 --model.expert_activation=SWIGLU");
  EXPECT_EQ(count(gated, "SwiGLU backward"), 1) << gated;
  const std::string dense = bench("kernels --repeat 1 --model.pattern=mamba --model.norm=RMS_NORM");
  EXPECT_EQ(count(dense, "expert"), 0) << dense;
  EXPECT_EQ(count(dense, "scan forward"), 1) << dense;
}

TEST_F(BenchCommand, ExchangeMeasuresEvenAndUnevenRouting) {
  const std::string table = bench("exchange --ranks 2 --repeat 2 --megabytes 0.1,1");
  EXPECT_EQ(count(table, "2 ranks on CPUs share 4 experts; rows of 24 f32"), 1) << table;
  static const std::regex line(
      " +(0\\.10|1\\.00) +(even +1|one expert +2) +[0-9.]+( +[0-9.]+ +[0-9.]+ +[0-9]+ %){2}"
      " +[0-9.]+ +[0-9.]+\n");
  EXPECT_EQ(std::distance(std::sregex_iterator(table.begin(), table.end(), line), {}), 4) << table;
}

TEST_F(BenchCommand, CheckpointMeasuresAndLeavesNothing) {
  ASSERT_EQ(shell("mkdir disk && touch disk/mine").code, 0);
  for (const char* ranks : {"", "--ranks 2 --parallel.expert=2 "}) {
    const std::string table = bench(std::string("checkpoint --repeat 2 ") + ranks + "--run=disk");
    for (const char* name : {"SHA-256 on all cores", "plain write and sync", "plain read", "save",
                             "load", "save behind the steps"})
      EXPECT_GE(numbers(table, name).size(), 2u) << table;
    EXPECT_EQ(numbers(table, "  holds up training for").size(), 2u) << table;
    EXPECT_EQ(count(table, " times the slower of SHA-256 and "), 2) << table;
    EXPECT_EQ(shell("ls disk").out, "mine\n");
  }
  bench("checkpoint --repeat 1 --run=new");
  EXPECT_EQ(shell("ls new").code, 2) << "a folder that was not there is there now";
}

TEST_F(BenchCommand, StepSaysSpeedAndLoss) {
  const std::string table = bench("step --steps 2 --warmup 1 --profile");
  const std::string kept = std::filesystem::temp_directory_path() / "moemamba-zipf-67-4194304";
  for (const char* kind : {".bin", ".idx"})
    EXPECT_TRUE(std::filesystem::remove(kept + kind)) << kept << kind;
  for (const char* part : {"step  ", "(median of 2;", " tokens/s", "loss  ", "scan_backward",
                           " TFLOP/s (2048 x 2048 x 2048, f32, on 1 rank)\n"})
    EXPECT_GE(count(table, part), 1) << part << "\nin\n" << table;
  const size_t at = table.find("\nceiling    ");
  ASSERT_NE(at, table.npos) << table;
  const double share = std::atof(table.c_str() + at + 12);  // in per cent
  EXPECT_GT(share, 0) << table;
  EXPECT_LT(share, 100) << table;
}

TEST_F(BenchCommand, SaysWhatIsMissing) {
  const std::pair<const char*, const char*> wrong[] = {
      {"exchange", "start two or more: --ranks 2"},
      {"exchange --model.pattern=mamba", "a model without experts exchanges nothing"},
      {"checkpoint", "--run=FOLDER"},
      {"kernels --repeat 0", "--repeat"},
      {"", "subcommand"}};
  for (const auto& [words, text] : wrong) {
    const Result result = shell(std::string("$moemamba bench ") + words);
    EXPECT_EQ(result.code, 2) << words;
    EXPECT_EQ(count(result.err, text), 1) << words << "\n" << result.err;
    EXPECT_EQ(result.out, "") << words;
  }
  const Result result = shell("$moemamba bench tune --device=CPU");
  EXPECT_EQ(result.code, 1);
  EXPECT_EQ(count(result.err, "algorithms are tuned on the GPU that will run them"), 1);
  for (const char* command : {"step", "kernels", "exchange", "checkpoint", "tune"})
    EXPECT_EQ(count(shell(std::string("$moemamba bench ") + command + " --help").out,
                    std::string("  moemamba bench ") + command) > 0,
              true)
        << command << " has no example";
}

}  // namespace
}  // namespace moemamba
