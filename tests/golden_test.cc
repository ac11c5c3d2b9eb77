#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "kernels/cpu/blas_core.h"
#include "kernels/cpu/simd/level.h"
#include "tests/support/training.h"

namespace moemamba {
namespace {

namespace fs = std::filesystem;

// Fifty losses of two ranks that share seven experts, with accumulation and two experts a token.
// Sizes at which OpenBLAS, the SIMD tails and several row blocks all take part.
constexpr TrainingCase kCase{.experts = 7,
                             .top_k = 2,
                             .width = 40,
                             .hidden = 52,
                             .vocabulary = 131,
                             .batch = 6,
                             .micro_batch = 2,
                             .length = 48,
                             .activation = ModelConfig::SWIGLU,
                             .steps = 50};

fs::path golden_folder() {
  return fs::path(MOEMAMBA_SOURCE_DIR) / "tests" / "golden";
}

// Bits depend on OpenBLAS' kernels; the vector width is named for the day when they depend on it.
std::string golden_name() {
  std::string name = blas_core() + " " + name_of(simd_level()) + ".txt";
  for (char& c : name) c = c == ' ' ? '-' : char(std::tolower(c));
  return name;
}

std::vector<double> losses(int threads) {
  TrainingCase c = kCase;
  c.threads = threads;
  const TrainingResult result = train(c, 2, 2);
  EXPECT_TRUE(result.ranks_agree);
  std::vector<double> list;
  for (const StepRecord& record : result.records) list.push_back(record.loss);
  return list;
}

// One loss a line, as C99 writes it in hexadecimal: exact, and readable by anything.
std::string to_text(const std::vector<double>& values) {
  std::string text;
  char line[64];
  for (double value : values) {
    std::snprintf(line, sizeof line, "%a\n", value);
    text += line;
  }
  return text;
}

std::vector<double> read_losses(const fs::path& path) {
  std::ifstream in(path);
  std::vector<double> values;
  for (std::string line; std::getline(in, line);)
    values.push_back(std::strtod(line.c_str(), nullptr));
  return values;
}

// The file of this machine's kind; else the one whose name agrees longest, to kOtherKernels alone.
fs::path nearest_golden() {
  const std::string own = golden_name();
  fs::path nearest;
  long longest = -1;
  for (const auto& entry : fs::directory_iterator(golden_folder())) {
    const std::string name = entry.path().filename().string();
    const auto end = std::ranges::mismatch(name, own).in1;
    const bool better = end - name.begin() > longest;
    const bool equal = end - name.begin() == longest && entry.path() < nearest;
    if (!better && !equal) continue;
    longest = end - name.begin();
    nearest = entry.path();
  }
  check(!nearest.empty(), golden_folder().string(),
        ": no golden losses; write them with golden_test --write-golden");
  return nearest;
}

// Rounding of other BLAS kernels, grown over fifty steps.
constexpr double kOtherKernels = 1e-4;

TEST(Golden, FiftyLossesAreThoseOfTheFile) {
  const std::vector<double> found = losses(1);
  const fs::path path = nearest_golden();
  const std::vector<double> expected = read_losses(path);
  ASSERT_EQ(found.size(), expected.size()) << path;
  const bool same_kind = path.filename() == golden_name();
  if (!same_kind)
    std::printf("no %s: compared with %s within %.0e; golden_test --write-golden makes one\n",
                golden_name().c_str(), path.filename().c_str(), kOtherKernels);
  for (size_t k = 0; k < found.size(); ++k) {
    if (same_kind)
      EXPECT_EQ(found[k], expected[k]) << "step " << k << " differs from " << path
                                       << "; a change that moves numbers says so and brings a new "
                                          "file (golden_test --write-golden)";
    else
      EXPECT_NEAR(found[k], expected[k], kOtherKernels * expected[k]) << "step " << k;
    if (testing::Test::HasFailure()) break;
  }
}

TEST(Golden, TwoThreadsAndASecondRunGiveTheSameBits) {
  const std::string once = to_text(losses(1));
  EXPECT_EQ(once, to_text(losses(2)));
  EXPECT_EQ(once, to_text(losses(1)));
}

// Makes the file of this machine's kind.
void write_golden() {
  const fs::path path = golden_folder() / golden_name();
  fs::create_directories(golden_folder());
  std::ofstream(path) << to_text(losses(1));
  std::printf("wrote %s\n", path.c_str());
}

}  // namespace
}  // namespace moemamba

// gtest's own main(), and --write-golden.
int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  if (argc != 2 || argv[1] != std::string("--write-golden")) return RUN_ALL_TESTS();
  moemamba::write_golden();
  return 0;
}
